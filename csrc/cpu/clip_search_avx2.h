// The clip search (clip_search.h) of 8 rows' groups at once, on AVX2. Included by one translation unit.
//
// Weights are int16, 16 to a register and in any order; vpmulhrsw is every rounding product of the rule, and
// vpmaddwd squares and adds. A candidate's codes are computed for the 8 rows together, its errors row by
// row. Rows whose numbers do not fit 16 bits give nonsense, and are those that a candidate may not be taken
// for.
#pragma once

#include "row_codes_avx2.h"
#include "sglang_er/clip_search.h"

namespace sglang_er::cpu::clip_rows {
namespace {

using namespace sglang_er::clip;

struct Add {
  SGLANG_ER_INLINE static __m256 of(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
};

SGLANG_ER_INLINE __m256 steps(__m256 weights, __m256 zero, __m256 inverse_scale) {
  return _mm256_mul_ps(_mm256_sub_ps(weights, zero), inverse_scale);
}

// Units of 8 weights, not cut.
SGLANG_ER_INLINE __m256i units(__m256 weights, __m256 zero, __m256 inverse_scale) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(steps(weights, zero, inverse_scale), _mm256_set1_ps(kUnits)));
}

SGLANG_ER_INLINE __m256i cut_units(__m256 weights, const RowCodes& whole) {
  const __m256 found = steps(weights, from_bf16(whole.zero), whole.inverse_scale);
  const __m256 cut = _mm256_min_ps(_mm256_max_ps(found, _mm256_set1_ps(kLowest)), _mm256_set1_ps(kHighest));
  return _mm256_cvtps_epi32(_mm256_mul_ps(cut, _mm256_set1_ps(kUnits)));
}

SGLANG_ER_INLINE __m256i ratio(__m256 x) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(kRatio)));
}

// The low half of every lane in both of its halves.
SGLANG_ER_INLINE __m256i twice(__m256i x) { return _mm256_blend_epi16(x, _mm256_slli_epi32(x, 16), 0xAA); }

// A candidate of 8 rows.
struct Candidates {
  RowCodes codes;
  __m256i zero, step, inverse;  // of clip_search.h's Candidate
};

SGLANG_ER_INLINE Candidates candidates(const RowCodes& whole, __m256 low, int index) {
  const __m256 s = from_bf16(whole.scale);
  const RowCodes codes = row_codes(row_scales(_mm256_mul_ps(s, _mm256_set1_ps(width(index)))),
                                   _mm256_add_ps(low, _mm256_mul_ps(s, _mm256_set1_ps(raise(index)))));
  return {codes, cut_units(from_bf16(codes.zero), whole),
          ratio(_mm256_mul_ps(from_bf16(codes.scale), whole.inverse_scale)),
          ratio(_mm256_mul_ps(s, codes.inverse_scale))};
}

template <int kInputs>
SGLANG_ER_INLINE __m256i squares(const int16_t (&units)[kHalf][kInputs], const Candidates& of) {
  alignas(32) int32_t zeros[kHalf], steps[kHalf], inverses[kHalf];
  _mm256_store_si256(reinterpret_cast<__m256i*>(zeros), twice(of.zero));
  _mm256_store_si256(reinterpret_cast<__m256i*>(steps), twice(of.step));
  _mm256_store_si256(reinterpret_cast<__m256i*>(inverses), twice(of.inverse));
  const __m256i to_level = _mm256_set1_epi16(1 << (15 - kLevelBits));
  __m256 sums[kHalf];
  for (int lane = 0; lane < kHalf; ++lane) {
    const __m256i zero = _mm256_set1_epi32(zeros[lane]), step = _mm256_set1_epi32(steps[lane]);
    const __m256i inverse = _mm256_set1_epi32(inverses[lane]);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < kInputs; i += 16) {
      const __m256i above =
          _mm256_sub_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(units[lane] + i)), zero);
      __m256i level = _mm256_mulhrs_epi16(_mm256_mulhrs_epi16(above, inverse), to_level);
      level = _mm256_min_epi16(_mm256_max_epi16(level, _mm256_setzero_si256()),
                               _mm256_set1_epi16(static_cast<int16_t>(kMaxLevel)));
      const __m256i value = _mm256_mulhrs_epi16(_mm256_slli_epi16(level, 15 - kStepBits), step);
      const __m256i error = _mm256_sub_epi16(above, value);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(error, error));
    }
    sums[lane] = _mm256_castsi256_ps(sum);
  }
  return _mm256_castps_si256(reduce_rows<Add>(sums));
}

// The best codes of 8 rows with these units, minima and maxima.
template <int kInputs>
SGLANG_ER_INLINE RowCodes search(const int16_t (&units)[kHalf][kInputs], __m256 low, __m256 high,
                                 const RowCodes& whole) {
  const __m256i lowest = cut_units(low, whole), highest = cut_units(high, whole);
  RowCodes best = whole;
  __m256i least = _mm256_set1_epi32(INT32_MAX), allowed = _mm256_set1_epi32(-1);
  for (int i = 0; i < kCandidates; ++i) {
    const Candidates of = candidates(whole, low, i);
    const __m256i range = _mm256_srai_epi32(
        _mm256_add_epi32(_mm256_mullo_epi32(of.step, _mm256_set1_epi32(static_cast<int>(kMaxLevel))),
                         _mm256_set1_epi32(1 << (kStepBits - 1))),
        kStepBits);
    const __m256i below = _mm256_sub_epi32(of.zero, lowest);
    const __m256i above = _mm256_sub_epi32(_mm256_sub_epi32(highest, of.zero), range);
    const __m256i outside = _mm256_cmpgt_epi32(_mm256_max_epi32(below, above), _mm256_set1_epi32(kOutside));
    allowed = i == 0 ? _mm256_andnot_si256(outside, allowed) : allowed;
    const __m256i sums = squares(units, of);
    const __m256i less = _mm256_and_si256(allowed, _mm256_cmpgt_epi32(least, sums));  // 31 bits, if they fit
    const __m256i better = _mm256_andnot_si256(outside, less);
    least = _mm256_blendv_epi8(least, sums, better);
    best.scale = _mm256_blendv_epi8(best.scale, of.codes.scale, better);
    best.zero = _mm256_blendv_epi8(best.zero, of.codes.zero, better);
    best.inverse_scale =
        _mm256_blendv_ps(best.inverse_scale, of.codes.inverse_scale, _mm256_castsi256_ps(better));
  }
  return best;
}

}  // namespace
}  // namespace sglang_er::cpu::clip_rows
