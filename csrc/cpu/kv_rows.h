// Rows of a KV pool as fp32 panels: keys as columns (one key per lane), values as they lie.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"
#include "unrolled.h"
#include "vec.h"
#include "words.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kPanelKeys = 32;  // keys in a panel: two vectors of scores per query row

// Into L2: a pool's rows, often a power of two apart, fall on few sets of L1.
SGLANG_ER_INLINE void prefetch(const uint8_t* address) { __builtin_prefetch(address, 0, 2); }

// Asks for rows ahead of those that are being read, a few lines at a time between other work: a burst would
// fill the line buffers and stall everything behind it.
struct Lookahead {
  const uint8_t* const* row;
  const uint8_t* const* end;
  int64_t row_bytes;
  int64_t offset = 0;

  SGLANG_ER_INLINE void ask(int lines) {
    for (; lines > 0 && row < end; --lines) {
      prefetch(*row + offset);
      offset += 64;
      if (offset >= row_bytes) offset = 0, ++row;
    }
  }
};

// How a row of a pool is stored: kPerWord dimensions, in order, in each 32-bit word.
template <class T>
struct Packing {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  static constexpr int64_t row_bytes(int dim) { return static_cast<int64_t>(dim) * sizeof(T); }
};

template <>
struct Packing<Int4> {
  static constexpr int kPerWord = 8;
  static constexpr int64_t row_bytes(int dim) { return dim / 2; }
};

// panel[d][0..15] = dimension d of the sixteen rows; panel rows are kPanelKeys apart.
template <class T>
void fill_keys(const uint8_t* const* rows, int dim, float* panel, Lookahead& ahead) {
  constexpr int kPerWord = Packing<T>::kPerWord;
  const int64_t bytes = Packing<T>::row_bytes(dim);
  const auto fill_step = [](const uint8_t* const* rows, int64_t offset, int count, float* out) {
    Words words[kStepWords];
    load_columns(rows, offset, words);
    unrolled<kStepWords>([&](auto w) {
      unrolled<kPerWord>([&](auto j) {
        constexpr int d = w() * kPerWord + j();
        if (d < count) store(out + d * kPanelKeys, element<j()>(words[w()], static_cast<T*>(nullptr)));
      });
    });
  };
  constexpr int kStep = kStepWords * kPerWord;
  int d = 0;
  for (; d + kStep <= dim; d += kStep) {
    ahead.ask(1);
    fill_step(rows, Packing<T>::row_bytes(d), kStep, panel + d * kPanelKeys);
  }
  if (d == dim) return;
  alignas(64) uint8_t copies[kLanes][kStepBytes] = {};
  const uint8_t* steps[kLanes];
  for (int row = 0; row < kLanes; ++row) {
    const int64_t begin = Packing<T>::row_bytes(d);
    std::memcpy(copies[row], rows[row] + begin, static_cast<size_t>(bytes - begin));
    steps[row] = copies[row];
  }
  fill_step(steps, 0, dim - d, panel + d * kPanelKeys);
}

// Dimensions [16 v, 16 v + 16) of a row of values, all of them there.
template <class T>
SGLANG_ER_INLINE Floats load_value(const uint8_t* row, int v) {
  return load(reinterpret_cast<const T*>(row) + v * kLanes);
}
template <>
SGLANG_ER_INLINE Floats load_value<Int4>(const uint8_t* row, int v) {
  Floats low, high;
  load_levels(reinterpret_cast<const Int4*>(row) + v / 2 * kLanes, low, high);
  return v % 2 == 0 ? low : high;
}

// The last, incomplete vector of a row of `dim` values, zero behind them.
template <class T>
SGLANG_ER_INLINE Floats load_last_value(const uint8_t* row, int dim) {
  return load_first(reinterpret_cast<const T*>(row) + dim / kLanes * kLanes, dim % kLanes);
}
template <>
SGLANG_ER_INLINE Floats load_last_value<Int4>(const uint8_t*, int) {
  return zero();  // dim is a multiple of kInt4DimMultiple
}

// A key row in fp32, with the levels of a quantized one not yet scaled.
template <class T>
SGLANG_ER_INLINE void widen_key(const uint8_t* row, int dim, float* out) {
  const T* elements = reinterpret_cast<const T*>(row);
  if constexpr (std::is_same_v<T, Int4>) {
    for (int d = 0; d < dim; ++d)
      out[d] = static_cast<float>(elements[d / 2].pair >> (d % 2 * 4) & 15) - 7.5f;
  } else if constexpr (std::is_same_v<T, int8_t>) {
    for (int d = 0; d < dim; ++d) out[d] = static_cast<float>(elements[d]);
  } else {
    for (int d = 0; d < dim; ++d) out[d] = to_float(elements[d]);
  }
}

}  // namespace
}  // namespace sglang_er::cpu
