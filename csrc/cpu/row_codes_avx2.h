// Scale and zero of 8 rows' groups at once, on AVX2. Included by one translation unit.
#pragma once

#include <immintrin.h>

#include "sglang_er/packed_weight.h"
#include "sglang_er/quantize.h"

namespace sglang_er::cpu {
namespace {

constexpr int kHalf = 8;  // rows that one register holds

struct Min {
  SGLANG_ER_INLINE static __m256 of(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
};
struct Max {
  SGLANG_ER_INLINE static __m256 of(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
};

// Lane r of the result is the minimum (maximum) over the lanes of rows[r]: a transpose that joins as it goes.
template <class Op>
SGLANG_ER_INLINE __m256 reduce_rows(const __m256 (&rows)[kHalf]) {
  __m256 pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    const __m256 a = rows[2 * i], b = rows[2 * i + 1];
    pairs[i] = Op::of(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
    quads[i] = Op::of(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return Op::of(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}

SGLANG_ER_INLINE __m256i to_bf16(__m256 values) {  // float_to_bf16 of finite values, in 32-bit lanes
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
}

SGLANG_ER_INLINE __m256 from_bf16(__m256i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)); }

SGLANG_ER_INLINE void store_bf16(uint16_t* out, __m256i bits) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}

// The codes of 8 rows (quantize.h): bf16 in 32-bit lanes, and 1/scale.
struct RowCodes {
  __m256i scale, zero;
  __m256 inverse_scale;
};

SGLANG_ER_INLINE RowCodes row_codes(__m256i scale, __m256 low) {
  __m256i zero = to_bf16(low);
  const __m256i magnitude = _mm256_and_si256(zero, _mm256_set1_epi32(0x7FFF));
  const __m256i infinite = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(kBf16Infinity));
  zero = _mm256_add_epi32(zero, infinite);  // -1 where it is
  return {scale, zero, _mm256_div_ps(_mm256_set1_ps(1.0f), from_bf16(scale))};
}

SGLANG_ER_INLINE __m256i row_scales(__m256 step) {
  return _mm256_max_epi32(to_bf16(step), _mm256_set1_epi32(kMinScaleBits));
}

// group_code of each row.
SGLANG_ER_INLINE RowCodes code_rows(__m256 low, __m256 high) {
  const __m256 levels = _mm256_set1_ps(kMaxLevel);
  const __m256 step = _mm256_sub_ps(_mm256_div_ps(high, levels), _mm256_div_ps(low, levels));
  return row_codes(row_scales(step), _mm256_add_ps(low, _mm256_setzero_ps()));
}

// `meta` is where the scales of the 8 rows begin, their zeros are 16 later.
SGLANG_ER_INLINE void store_codes(const RowCodes& codes, uint16_t* meta, float* zeros,
                                  float* inverse_scales) {
  store_bf16(meta, codes.scale);
  store_bf16(meta + kRowBlock, codes.zero);
  _mm256_store_ps(zeros, from_bf16(codes.zero));
  _mm256_store_ps(inverse_scales, codes.inverse_scale);
}

}  // namespace
}  // namespace sglang_er::cpu
