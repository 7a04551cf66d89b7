// vec.h on AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "dtype.h"
#include "sglang_er/macros.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kLanes = 16;

struct Floats {
  __m512 v;
};

SGLANG_ER_INLINE Floats zero() { return {_mm512_setzero_ps()}; }
SGLANG_ER_INLINE Floats broadcast(float value) { return {_mm512_set1_ps(value)}; }
SGLANG_ER_INLINE Floats load(const float* values) { return {_mm512_loadu_ps(values)}; }
SGLANG_ER_INLINE Floats load(const _Float16* values) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)))};
}
SGLANG_ER_INLINE Floats load_bf16(const uint16_t* values) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
SGLANG_ER_INLINE Floats load(const int8_t* values) {
  return {
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))))};
}
SGLANG_ER_INLINE void store(float* out, Floats value) { _mm512_storeu_ps(out, value.v); }
SGLANG_ER_INLINE void store(_Float16* out, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(value.v, _MM_FROUND_TO_NEAREST_INT));
}
// float_to_bf16() of every lane.
SGLANG_ER_INLINE void store_bf16(uint16_t* out, Floats value) {
  const __m512i bits = _mm512_castps_si512(value.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __mmask16 nan = _mm512_cmp_ps_mask(value.v, value.v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __m512i either = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(either));
}

SGLANG_ER_INLINE Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
SGLANG_ER_INLINE Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
SGLANG_ER_INLINE Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
SGLANG_ER_INLINE Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
SGLANG_ER_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SGLANG_ER_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
SGLANG_ER_INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
SGLANG_ER_INLINE Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
SGLANG_ER_INLINE Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }

// value * 2^n for integral n in [-126, 127].
SGLANG_ER_INLINE Floats scale_by_power_of_two(Floats value, Floats n) {
  return {_mm512_scalef_ps(value.v, n.v)};
}
// value, but 0 in the lanes where x < limit.
SGLANG_ER_INLINE Floats zero_below(Floats value, Floats x, Floats limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), value.v)};
}

// Horizontal: the order of additions is fixed and the same on every instruction set (halves, quarters, ...).
SGLANG_ER_INLINE float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
SGLANG_ER_INLINE float reduce_max(Floats a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace
}  // namespace sglang_er::cpu
