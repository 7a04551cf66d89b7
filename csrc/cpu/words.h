// Sixteen rows of memory as columns: 32-bit words with one row per lane, and their elements as fp32 lanes.
//
// This is how keys, which lie row by row, become operands with one key per lane. The step is 16 bytes of each
// row: every row of a KV pool is a multiple of 16 bytes but for 8-bit rows of odd dimensions.
#pragma once

#include <bit>
#include <cstring>

#include "vec.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kStepBytes = 16;
inline constexpr int kStepWords = 4;

// Two 4-bit levels n, each the value n - 7.5 (kv_shadow.h).
struct Int4 {
  uint8_t pair;
};

#if defined(__AVX512F__)

struct Words {
  __m512i v;
};

SGLANG_ER_INLINE __m128i load_step(const uint8_t* row) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
}

// Lane r of words[w] is word w of rows[r] + offset.
SGLANG_ER_INLINE void load_columns(const uint8_t* const* rows, int64_t offset, Words (&words)[kStepWords]) {
  // Register i holds rows i, 4 + i, 8 + i and 12 + i in its four quarters; then each quarter is transposed.
  const auto gather = [rows, offset](int i) {
    __m512i four = _mm512_castsi128_si512(load_step(rows[i] + offset));
    four = _mm512_inserti32x4(four, load_step(rows[4 + i] + offset), 1);
    four = _mm512_inserti32x4(four, load_step(rows[8 + i] + offset), 2);
    return _mm512_inserti32x4(four, load_step(rows[12 + i] + offset), 3);
  };
  const __m512i a = gather(0), b = gather(1), c = gather(2), d = gather(3);
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  words[0] = {_mm512_unpacklo_epi64(ab_low, cd_low)};
  words[1] = {_mm512_unpackhi_epi64(ab_low, cd_low)};
  words[2] = {_mm512_unpacklo_epi64(ab_high, cd_high)};
  words[3] = {_mm512_unpackhi_epi64(ab_high, cd_high)};
}

// Element J of every word.
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const BFloat16*) {
  if constexpr (J == 0) return {_mm512_castsi512_ps(_mm512_slli_epi32(words.v, 16))};
  return {_mm512_castsi512_ps(_mm512_and_si512(words.v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const _Float16*) {
  const __m512i low = J == 0 ? words.v : _mm512_srli_epi32(words.v, 16);
  return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(low))};
}
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const float*) {
  return {_mm512_castsi512_ps(words.v)};
}
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const int8_t*) {
  const __m512i top = J == 3 ? words.v : _mm512_slli_epi32(words.v, 24 - 8 * J);
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24))};
}
// vpermps reads the low 4 bits of a lane as an index: a table of the levels needs no mask and no conversion.
SGLANG_ER_INLINE Floats levels(__m512i nibbles) {
  const __m512 table = _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f,
                                      2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f);
  return {_mm512_permutexvar_ps(nibbles, table)};
}
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const Int4*) {
  return levels(J == 0 ? words.v : _mm512_srli_epi32(words.v, 4 * J));
}
// The low and the high levels of sixteen bytes.
SGLANG_ER_INLINE void load_levels(const Int4* pairs, Floats& low, Floats& high) {
  const __m512i bytes = _mm512_cvtepu8_epi32(load_step(reinterpret_cast<const uint8_t*>(pairs)));
  low = levels(bytes);
  high = levels(_mm512_srli_epi32(bytes, 4));
}

#elif defined(__AVX2__)

struct Words {
  __m256i low, high;
};

SGLANG_ER_INLINE void load_eight(const uint8_t* const* rows, int64_t offset, __m256i (&words)[kStepWords]) {
  const auto gather = [rows, offset](int i) {
    const auto load = [](const uint8_t* row) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load(rows[i] + offset)), load(rows[4 + i] + offset),
                                   1);
  };
  const __m256i a = gather(0), b = gather(1), c = gather(2), d = gather(3);
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  words[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
  words[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
  words[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
  words[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}

SGLANG_ER_INLINE void load_columns(const uint8_t* const* rows, int64_t offset, Words (&words)[kStepWords]) {
  __m256i low[kStepWords], high[kStepWords];
  load_eight(rows, offset, low);
  load_eight(rows + 8, offset, high);
  for (int w = 0; w < kStepWords; ++w) words[w] = {low[w], high[w]};
}

template <class Fn>
SGLANG_ER_INLINE Floats each_half(Words words, const Fn& fn) {
  return {fn(words.low), fn(words.high)};
}
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const BFloat16*) {
  return each_half(words, [](__m256i bits) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    return _mm256_castsi256_ps(J == 0 ? _mm256_slli_epi32(bits, 16) : _mm256_and_si256(bits, mask));
  });
}
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const _Float16*) {
  return each_half(words, [](__m256i bits) {
    const __m256i low =
        J == 0 ? _mm256_and_si256(bits, _mm256_set1_epi32(0xFFFF)) : _mm256_srli_epi32(bits, 16);
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
  });
}
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const float*) {
  return each_half(words, [](__m256i bits) { return _mm256_castsi256_ps(bits); });
}
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const int8_t*) {
  return each_half(words, [](__m256i bits) {
    const __m256i top = J == 3 ? bits : _mm256_slli_epi32(bits, 24 - 8 * J);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
  });
}
SGLANG_ER_INLINE __m256 levels(__m256i nibbles) {
  const __m256i low = _mm256_and_si256(nibbles, _mm256_set1_epi32(15));
  return _mm256_sub_ps(_mm256_cvtepi32_ps(low), _mm256_set1_ps(7.5f));
}
template <int J>
SGLANG_ER_INLINE Floats element(Words words, const Int4*) {
  return each_half(words,
                   [](__m256i bits) { return levels(J == 0 ? bits : _mm256_srli_epi32(bits, 4 * J)); });
}
// The low and the high levels of sixteen bytes.
SGLANG_ER_INLINE void load_levels(const Int4* pairs, Floats& low, Floats& high) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs));
  const __m256i first = _mm256_cvtepu8_epi32(bytes), last = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
  low = {levels(first), levels(last)};
  high = {levels(_mm256_srli_epi32(first, 4)), levels(_mm256_srli_epi32(last, 4))};
}

#else

struct Words {
  uint32_t lane[kLanes];
};

SGLANG_ER_INLINE void load_columns(const uint8_t* const* rows, int64_t offset, Words (&words)[kStepWords]) {
  for (int row = 0; row < kLanes; ++row) {
    uint32_t step[kStepWords];
    std::memcpy(step, rows[row] + offset, kStepBytes);
    for (int w = 0; w < kStepWords; ++w) words[w].lane[row] = step[w];
  }
}

template <int J>
SGLANG_ER_INLINE Floats element(const Words& words, const BFloat16*) {
  return each_lane([&](int i) {
    return std::bit_cast<float>(J == 0 ? words.lane[i] << 16 : words.lane[i] & 0xFFFF0000u);
  });
}
template <int J>
SGLANG_ER_INLINE Floats element(const Words& words, const _Float16*) {
  return each_lane([&](int i) {
    return to_float(std::bit_cast<_Float16>(static_cast<uint16_t>(words.lane[i] >> (16 * J))));
  });
}
template <int J>
SGLANG_ER_INLINE Floats element(const Words& words, const float*) {
  return each_lane([&](int i) { return std::bit_cast<float>(words.lane[i]); });
}
template <int J>
SGLANG_ER_INLINE Floats element(const Words& words, const int8_t*) {
  return each_lane([&](int i) { return static_cast<float>(static_cast<int8_t>(words.lane[i] >> (8 * J))); });
}
SGLANG_ER_INLINE float level(uint32_t nibble) {
  return static_cast<float>(static_cast<int>(nibble & 15)) - 7.5f;
}
template <int J>
SGLANG_ER_INLINE Floats element(const Words& words, const Int4*) {
  return each_lane([&](int i) { return level(words.lane[i] >> (4 * J)); });
}
// The low and the high levels of sixteen bytes.
SGLANG_ER_INLINE void load_levels(const Int4* pairs, Floats& low, Floats& high) {
  low = each_lane([&](int i) { return level(pairs[i].pair); });
  high = each_lane([&](int i) { return level(pairs[i].pair >> 4); });
}

#endif

}  // namespace
}  // namespace sglang_er::cpu
