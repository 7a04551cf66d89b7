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

  // Left to choose, GCC reads x again for every row of W where that has room (6 and 7 rows of x, of all
  // numbers): twice the loads, half the speed at 6.
  SGLANG_ER_INLINE static void hold(Floats& inputs) { asm("" : "+v"(inputs.v)); }

  // The additions of sum() for sixteen vectors: halves, quarters, and twice within four lanes.
  SGLANG_ER_INLINE static Floats sum16(const float* vectors) {
    const __m512 a = sum8(vectors), b = sum8(vectors + 8 * kLanes);
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
    // Four lanes hold vectors i, 4 + i, 8 + i and 12 + i.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_permutexvar_ps(order, sums)};
  }

 private:
  // Two lanes are left of each vector: of i and 4 + i in the i-th quarter.
  SGLANG_ER_INLINE static __m512 sum8(const float* vectors) {
    const __m512 a = sum4(vectors), b = sum4(vectors + 4 * kLanes);
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  }
  // Four lanes are left of each vector: the i-th quarter.
  SGLANG_ER_INLINE static __m512 sum4(const float* vectors) {
    const __m512 a = sum2(vectors), b = sum2(vectors + 2 * kLanes);
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  }
  SGLANG_ER_INLINE static __m512 sum2(const float* vectors) {
    const __m512 a = _mm512_loadu_ps(vectors), b = _mm512_loadu_ps(vectors + kLanes);
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  }
};

}  // namespace
}  // namespace sglang_er::cpu
