// sum() of sixteen vectors at once: the same additions in the same order, on AVX-512 side by side. Two or
// four vectors may be folded into one while they are in registers: what halving left of the i-th lies in the
// i-th part.
#pragma once

#include "vec.h"

namespace sglang_er::cpu {
namespace {

#if defined(__AVX512F__)

inline constexpr bool kFolds = true;

// Of two vectors, each part's first half plus its second.
SGLANG_ER_INLINE __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, a, b), _mm512_shuffle_f32x4(a, b, 0x4E));
}
SGLANG_ER_INLINE __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
SGLANG_ER_INLINE __m512 add_eighths(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
}

// The additions of sum() for F vectors (1: none), as far as they go.
template <int F>
SGLANG_ER_INLINE Floats fold(const Floats* v) {
  if constexpr (F == 1) return v[0];
  if constexpr (F == 2) return {add_halves(v[0].v, v[1].v)};
  return {add_quarters(add_halves(v[0].v, v[1].v), add_halves(v[2].v, v[3].v))};
}

// Vectors that were folded F at a time (1: not at all), each in the place of its first; vectors 0..3 as one.
template <int F>
SGLANG_ER_INLINE __m512 fold_four(const float* vectors) {
  const auto two = [](const float* pair) {
    if constexpr (F == 2) return _mm512_loadu_ps(pair);
    return add_halves(_mm512_loadu_ps(pair), _mm512_loadu_ps(pair + kLanes));
  };
  if constexpr (F == 4) return _mm512_loadu_ps(vectors);
  return add_quarters(two(vectors), two(vectors + 2 * kLanes));
}

// Their sums, which lie one after the other.
template <int F>
SGLANG_ER_INLINE Floats sum16(const float* vectors) {
  const __m512 a = add_eighths(fold_four<F>(vectors), fold_four<F>(vectors + 4 * kLanes));
  const __m512 b = add_eighths(fold_four<F>(vectors + 8 * kLanes), fold_four<F>(vectors + 12 * kLanes));
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
  // Four lanes hold vectors i, 4 + i, 8 + i and 12 + i.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_permutexvar_ps(order, sums)};
}

#else

inline constexpr bool kFolds = false;

template <int F>
SGLANG_ER_INLINE Floats fold(const Floats* vectors) {
  static_assert(F == 1);
  return vectors[0];
}

template <int F>
SGLANG_ER_INLINE Floats sum16(const float* vectors) {
  static_assert(F == 1);
  float sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = sum(load(vectors + i * kLanes));
  return load(sums);
}

#endif

}  // namespace
}  // namespace sglang_er::cpu
