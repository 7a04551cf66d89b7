// vec.h on AVX2 with FMA and F16C: two registers of eight lanes.
#pragma once

#include <immintrin.h>

#include "dtype.h"
#include "sglang_er/macros.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kLanes = 16;

struct Floats {
  __m256 low, high;
};

SGLANG_ER_INLINE Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SGLANG_ER_INLINE Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
SGLANG_ER_INLINE Floats load(const float* values) {
  return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}
SGLANG_ER_INLINE Floats load(const _Float16* values) {
  const auto* halves = reinterpret_cast<const __m128i*>(values);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
SGLANG_ER_INLINE __m256 widen_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
SGLANG_ER_INLINE Floats load_bf16(const uint16_t* values) {
  const auto* halves = reinterpret_cast<const __m128i*>(values);
  return {widen_bf16(_mm_loadu_si128(halves)), widen_bf16(_mm_loadu_si128(halves + 1))};
}
SGLANG_ER_INLINE Floats load(const int8_t* values) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
SGLANG_ER_INLINE void store(float* out, Floats value) {
  _mm256_storeu_ps(out, value.low);
  _mm256_storeu_ps(out + 8, value.high);
}

SGLANG_ER_INLINE void store(_Float16* out, Floats value) {
  auto* halves = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(halves, _mm256_cvtps_ph(value.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(value.high, _MM_FROUND_TO_NEAREST_INT));
}
// float_to_bf16() of every lane.
SGLANG_ER_INLINE __m256i bf16_words(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
}
SGLANG_ER_INLINE void store_bf16(uint16_t* out, Floats value) {
  const __m256i words = _mm256_packus_epi32(bf16_words(value.low), bf16_words(value.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(words, 0xD8));
}

SGLANG_ER_INLINE Floats add(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
SGLANG_ER_INLINE Floats sub(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
SGLANG_ER_INLINE Floats mul(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
SGLANG_ER_INLINE Floats div(Floats a, Floats b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
SGLANG_ER_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
SGLANG_ER_INLINE Floats max(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
SGLANG_ER_INLINE Floats min(Floats a, Floats b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
SGLANG_ER_INLINE Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
SGLANG_ER_INLINE Floats round(Floats a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}

// value * 2^n for integral n in [-126, 127].
SGLANG_ER_INLINE __m256 scale_half(__m256 value, __m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
SGLANG_ER_INLINE Floats scale_by_power_of_two(Floats value, Floats n) {
  return {scale_half(value.low, n.low), scale_half(value.high, n.high)};
}
// value, but 0 in the lanes where x < limit.
SGLANG_ER_INLINE Floats zero_below(Floats value, Floats x, Floats limit) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.low, limit.low, _CMP_NLT_UQ), value.low),
          _mm256_and_ps(_mm256_cmp_ps(x.high, limit.high, _CMP_NLT_UQ), value.high)};
}

// Horizontal: the order of additions is fixed and the same on every instruction set (halves, quarters, ...).
SGLANG_ER_INLINE float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
SGLANG_ER_INLINE float reduce_max(Floats a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace sglang_er::cpu
