// What bf16_linear needs of AVX-512, with and without dot products of bf16 pairs.
#pragma once

#include <immintrin.h>

#include "bf16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx512 {
  static constexpr bool kDot = false;
  static constexpr int kMaxTile = 6;
  static constexpr int rows_at_once(int) { return 4; }  // 24 sums, 6 inputs, a weight, a mask
  static constexpr bool prefetches(int) { return true; }

  // Little-endian: in a word of two bf16 the even input is the low half.
  SGLANG_ER_INLINE static Floats even(const BFloat16* weights) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(weights), 16))};
  }
  SGLANG_ER_INLINE static Floats odd(const BFloat16* weights) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(weights), _mm512_set1_epi32(-0x10000)))};
  }

  // The additions of sum(), four vectors at a time: halves, quarters, and within four lanes.
  SGLANG_ER_INLINE static void sum4(const float* vectors, float* sums) {
    const __m512 a = _mm512_loadu_ps(vectors), b = _mm512_loadu_ps(vectors + 16);
    const __m512 c = _mm512_loadu_ps(vectors + 32), d = _mm512_loadu_ps(vectors + 48);
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    const __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x0E));
    const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0x01));
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_permutexvar_ps(lanes, one)));
  }
};

}  // namespace
}  // namespace sglang_er::cpu
