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

#endif

}  // namespace
}  // namespace sglang_er::cpu
