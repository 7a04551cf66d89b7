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
  static constexpr bool kNear = false;
  static constexpr bool unrolls(int tile) { return tile <= 4; }
  static constexpr int64_t kStripeRows = 64;  // 128 KiB of bf16 in a slice: L2 holds it and the next one

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

  static constexpr bool kFolds = true;
  // The additions of sum() for R vectors at once, as far as they go: lanes of the i-th part of 16 / R are
  // what halving left of the i-th vector.
  SGLANG_ER_INLINE static Floats fold(const Floats (&rows)[2]) { return {halves(rows[0].v, rows[1].v)}; }
  SGLANG_ER_INLINE static Floats fold(const Floats (&rows)[4]) {
    return {quarters(halves(rows[0].v, rows[1].v), halves(rows[2].v, rows[3].v))};
  }

  // The sums of sixteen vectors that were folded F at a time, each in the place of its first.
  template <int F>
  SGLANG_ER_INLINE static Floats sum16(const float* vectors) {
    const __m512 a = eighths(four<F>(vectors), four<F>(vectors + 4 * kLanes));
    const __m512 b = eighths(four<F>(vectors + 8 * kLanes), four<F>(vectors + 12 * kLanes));
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
    // Four lanes hold vectors i, 4 + i, 8 + i and 12 + i.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_permutexvar_ps(order, sums)};
  }

 private:
  // Of two vectors, each part's first half plus its second.
  SGLANG_ER_INLINE static __m512 halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, a, b), _mm512_shuffle_f32x4(a, b, 0x4E));
  }
  SGLANG_ER_INLINE static __m512 quarters(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  }
  SGLANG_ER_INLINE static __m512 eighths(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  }
  // Vectors 0..3 as one.
  template <int F>
  SGLANG_ER_INLINE static __m512 four(const float* vectors) {
    if constexpr (F == 4) {
      return _mm512_loadu_ps(vectors);
    } else {
      return quarters(two<F>(vectors), two<F>(vectors + 2 * kLanes));
    }
  }
  template <int F>
  SGLANG_ER_INLINE static __m512 two(const float* vectors) {
    if constexpr (F == 2) {
      return _mm512_loadu_ps(vectors);
    } else {
      return halves(_mm512_loadu_ps(vectors), _mm512_loadu_ps(vectors + kLanes));
    }
  }
};

}  // namespace
}  // namespace sglang_er::cpu
