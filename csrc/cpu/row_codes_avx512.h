// Scale and zero of 16 rows' groups at once, on AVX-512. Included by one translation unit.
#pragma once

#include <immintrin.h>

#include "sglang_er/packed_weight.h"
#include "sglang_er/quantize.h"

namespace sglang_er::cpu {
namespace {

struct Min {
  SGLANG_ER_INLINE static __m512 of(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
};
struct Max {
  SGLANG_ER_INLINE static __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

// Lane r of the result is the minimum (maximum) over the lanes of rows[r]: a transpose that joins as it goes.
template <class Op>
SGLANG_ER_INLINE __m512 reduce_rows(const __m512 (&rows)[kRowBlock]) {
  __m512 pairs[8], quads[4], halves[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = rows[2 * i], b = rows[2 * i + 1];
    pairs[i] = Op::of(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = Op::of(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quads[2 * i], b = quads[2 * i + 1];
    halves[i] = Op::of(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  }
  return Op::of(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                _mm512_shuffle_f32x4(halves[0], halves[1], 0xDD));
}

SGLANG_ER_INLINE __m512i to_bf16(__m512 values) {  // float_to_bf16 of finite values, in 32-bit lanes
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
}

SGLANG_ER_INLINE __m512 from_bf16(__m512i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)); }

// The codes of 16 rows (quantize.h): bf16 in 32-bit lanes, and 1/scale.
struct RowCodes {
  __m512i scale, zero;
  __m512 inverse_scale;
};

SGLANG_ER_INLINE RowCodes row_codes(__m512i scale, __m512 low) {
  __m512i zero = to_bf16(low);
  const __m512i magnitude = _mm512_and_si512(zero, _mm512_set1_epi32(0x7FFF));
  const __mmask16 infinite = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(kBf16Infinity));
  zero = _mm512_mask_sub_epi32(zero, infinite, zero, _mm512_set1_epi32(1));
  return {scale, zero, _mm512_div_ps(_mm512_set1_ps(1.0f), from_bf16(scale))};
}

SGLANG_ER_INLINE __m512i row_scales(__m512 step) {
  return _mm512_max_epi32(to_bf16(step), _mm512_set1_epi32(kMinScaleBits));
}

// group_code of each row.
SGLANG_ER_INLINE RowCodes code_rows(__m512 low, __m512 high) {
  const __m512 levels = _mm512_set1_ps(kMaxLevel);
  const __m512 step = _mm512_sub_ps(_mm512_div_ps(high, levels), _mm512_div_ps(low, levels));
  return row_codes(row_scales(step), _mm512_add_ps(low, _mm512_setzero_ps()));
}

// Scales and zeros go to meta[0..15] and meta[16..31].
SGLANG_ER_INLINE void store_codes(const RowCodes& codes, uint16_t* meta, float* zeros,
                                  float* inverse_scales) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(meta), _mm512_cvtepi32_epi16(codes.scale));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(meta + kRowBlock), _mm512_cvtepi32_epi16(codes.zero));
  _mm512_store_ps(zeros, from_bf16(codes.zero));
  _mm512_store_ps(inverse_scales, codes.inverse_scale);
}

}  // namespace
}  // namespace sglang_er::cpu
