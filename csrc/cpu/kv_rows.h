// Rows of a KV pool, and of its shadow, as fp32 vectors of sixteen dimensions.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"
#include "int4.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kPanelKeys = 32;  // keys whose values share a panel

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

// How a row of a pool is stored.
template <class T>
struct Packing {
  static constexpr int64_t row_bytes(int dim) { return static_cast<int64_t>(dim) * sizeof(T); }
};

template <>
struct Packing<Int4> {
  static constexpr int64_t row_bytes(int dim) { return dim / 2; }
};

// Dimensions [16 v, 16 v + 16) of a row, all of them there; for int4 of a row of values.
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

// Keys of these types come two vectors at a time: of 32 dimensions the even ones and the odd ones, which
// takes no shuffle. Rows of q that meet them lie the same way (split_row).
template <class T>
constexpr bool split = std::is_same_v<T, BFloat16> || std::is_same_v<T, Int4>;

SGLANG_ER_INLINE void load_split(const BFloat16* key, Floats& even, Floats& odd) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_loadu_si512(key);  // little-endian: the even element is a word's low half
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x10000)))};
#elif defined(__AVX2__)
  const auto* words = reinterpret_cast<const __m256i*>(key);
  const auto high = [](__m256i pair) {
    return _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(-0x10000)));
  };
  const __m256i first = _mm256_loadu_si256(words), last = _mm256_loadu_si256(words + 1);
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(first, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(last, 16))};
  odd = {high(first), high(last)};
#else
  even = each_lane([&](int i) { return to_float(key[2 * i]); });
  odd = each_lane([&](int i) { return to_float(key[2 * i + 1]); });
#endif
}
SGLANG_ER_INLINE void load_split(const Int4* key, Floats& even, Floats& odd) { load_levels(key, even, odd); }

// Of every 32 elements the even ones first; a rest stays as it is.
SGLANG_ER_INLINE void split_row(float* row, int dim) {
  for (float* const end = row + dim / (2 * kLanes) * 2 * kLanes; row < end; row += 2 * kLanes) {
    float block[2 * kLanes];
    std::memcpy(block, row, sizeof(block));
    for (int d = 0; d < kLanes; ++d) row[d] = block[2 * d];
    for (int d = 0; d < kLanes; ++d) row[kLanes + d] = block[2 * d + 1];
  }
}

// The last, incomplete vector of a row of `dim` elements, zero behind them.
template <class T>
SGLANG_ER_INLINE Floats load_last_value(const uint8_t* row, int dim) {
  return load_first(reinterpret_cast<const T*>(row) + dim / kLanes * kLanes, dim % kLanes);
}
template <>
SGLANG_ER_INLINE Floats load_last_value<Int4>(const uint8_t*, int) {
  return zero();  // dim is a multiple of kInt4DimMultiple
}

}  // namespace
}  // namespace sglang_er::cpu
