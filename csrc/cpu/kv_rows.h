// Rows of a KV pool as fp32 panels: keys as columns (one key per lane), values as they lie.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "dtype.h"
#include "vec.h"
#include "words.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kPanelKeys = 32;  // keys in a panel: two vectors of scores per query row

SGLANG_ER_INLINE void prefetch(const void* address) { __builtin_prefetch(address); }

// Which dimension element j of 32-bit word w of a row is.
template <class T>
struct Packing {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  static constexpr int64_t row_bytes(int dim) { return static_cast<int64_t>(dim) * sizeof(T); }
  static constexpr int dimension(int word, int j) { return word * kPerWord + j; }
};

template <class T, int... J>
SGLANG_ER_INLINE void store_word(Words words, int word, float* panel, std::integer_sequence<int, J...>) {
  (store(panel + Packing<T>::dimension(word, J) * kPanelKeys, element<J>(words, static_cast<T*>(nullptr))),
   ...);
}

// panel[d][0..15] = dimension d of the sixteen rows; panel rows are kPanelKeys apart. The rows `ahead`
// further on are asked for meanwhile.
template <class T>
void fill_keys(const uint8_t* const* rows, int dim, int ahead, float* panel) {
  using Elements = std::make_integer_sequence<int, Packing<T>::kPerWord>;
  const int64_t bytes = Packing<T>::row_bytes(dim);
  Words words[kStepWords];
  int word = 0;
  for (int64_t offset = 0; offset + kStepBytes <= bytes; offset += kStepBytes, word += kStepWords) {
    if (offset % 64 == 0) {
      for (int row = 0; row < kLanes; ++row) prefetch(rows[ahead + row] + offset);
    }
    load_columns(rows, offset, words);
    for (int w = 0; w < kStepWords; ++w) store_word<T>(words[w], word + w, panel, Elements{});
  }
  const int64_t rest = bytes % kStepBytes;
  if (rest == 0) return;
  alignas(64) uint8_t copies[kLanes][kStepBytes] = {};
  const uint8_t* steps[kLanes];
  for (int row = 0; row < kLanes; ++row) {
    std::memcpy(copies[row], rows[row] + bytes - rest, static_cast<size_t>(rest));
    steps[row] = copies[row];
  }
  load_columns(steps, 0, words);
  for (int w = 0; w < rest / 4; ++w) store_word<T>(words[w], word + w, panel, Elements{});
}

// panel[0..dim) = a row of values, zero up to a multiple of sixteen.
template <class T>
SGLANG_ER_INLINE void fill_value(const uint8_t* row, int dim, const uint8_t* next, float* panel) {
  const T* values = reinterpret_cast<const T*>(row);
  constexpr int kLineElements = 64 / static_cast<int>(sizeof(T));
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    if (d % kLineElements == 0) prefetch(next + static_cast<int64_t>(d) * sizeof(T));
    store(panel + d, load(values + d));
  }
  if (d < dim) store(panel + d, load_first(values + d, dim - d));
}

}  // namespace
}  // namespace sglang_er::cpu
