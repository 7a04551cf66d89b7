// The clip search (clip_search.h) of 16 rows' groups at once, on AVX-512. Included by one translation unit.
//
// Weights are int16, 32 to a register and in any order; vpmulhrsw is every rounding product of the rule, and
// vpmaddwd squares and adds. A candidate's codes are computed for the 16 rows together, its errors row by
// row. Rows whose numbers do not fit 16 bits give nonsense, and are those that a candidate may not be taken
// for.
#pragma once

#include "row_codes_avx512.h"
#include "sglang_er/clip_search.h"

namespace sglang_er::cpu::clip_rows {
namespace {

using namespace sglang_er::clip;

struct Add {
  SGLANG_ER_INLINE static __m512 of(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

SGLANG_ER_INLINE __m512 steps(__m512 weights, __m512 zero, __m512 inverse_scale) {
  return _mm512_mul_ps(_mm512_sub_ps(weights, zero), inverse_scale);
}

// Units of 16 weights, not cut.
SGLANG_ER_INLINE __m512i units(__m512 weights, __m512 zero, __m512 inverse_scale) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(steps(weights, zero, inverse_scale), _mm512_set1_ps(kUnits)));
}

SGLANG_ER_INLINE __m512i cut_units(__m512 weights, const RowCodes& whole) {
  const __m512 found = steps(weights, from_bf16(whole.zero), whole.inverse_scale);
  const __m512 cut = _mm512_min_ps(_mm512_max_ps(found, _mm512_set1_ps(kLowest)), _mm512_set1_ps(kHighest));
  return _mm512_cvtps_epi32(_mm512_mul_ps(cut, _mm512_set1_ps(kUnits)));
}

SGLANG_ER_INLINE __m512i ratio(__m512 x) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(kRatio)));
}

// The low half of every lane in both of its halves.
SGLANG_ER_INLINE __m512i twice(__m512i x) {
  return _mm512_mask_blend_epi16(0xAAAAAAAA, x, _mm512_slli_epi32(x, 16));
}

// A candidate of 16 rows.
struct Candidates {
  RowCodes codes;
  __m512i zero, step, inverse;  // of clip_search.h's Candidate
};

SGLANG_ER_INLINE Candidates candidates(const RowCodes& whole, __m512 low, int index) {
  const __m512 s = from_bf16(whole.scale);
  const RowCodes codes = row_codes(row_scales(_mm512_mul_ps(s, _mm512_set1_ps(width(index)))),
                                   _mm512_add_ps(low, _mm512_mul_ps(s, _mm512_set1_ps(raise(index)))));
  return {codes, cut_units(from_bf16(codes.zero), whole),
          ratio(_mm512_mul_ps(from_bf16(codes.scale), whole.inverse_scale)),
          ratio(_mm512_mul_ps(s, codes.inverse_scale))};
}

template <int kInputs>
SGLANG_ER_INLINE __m512i squares(const int16_t (&units)[kRowBlock][kInputs], const Candidates& of) {
  alignas(64) int32_t zeros[kRowBlock], steps[kRowBlock], inverses[kRowBlock];
  _mm512_store_si512(zeros, twice(of.zero));
  _mm512_store_si512(steps, twice(of.step));
  _mm512_store_si512(inverses, twice(of.inverse));
  const __m512i to_level = _mm512_set1_epi16(1 << (15 - kLevelBits));
  __m512 sums[kRowBlock];
  for (int lane = 0; lane < kRowBlock; ++lane) {
    const __m512i zero = _mm512_set1_epi32(zeros[lane]), step = _mm512_set1_epi32(steps[lane]);
    const __m512i inverse = _mm512_set1_epi32(inverses[lane]);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < kInputs; i += 32) {
      const __m512i above = _mm512_sub_epi16(_mm512_load_si512(units[lane] + i), zero);
      __m512i level = _mm512_mulhrs_epi16(_mm512_mulhrs_epi16(above, inverse), to_level);
      level = _mm512_min_epi16(_mm512_max_epi16(level, _mm512_setzero_si512()),
                               _mm512_set1_epi16(static_cast<int16_t>(kMaxLevel)));
      const __m512i value = _mm512_mulhrs_epi16(_mm512_slli_epi16(level, 15 - kStepBits), step);
      const __m512i error = _mm512_sub_epi16(above, value);
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(error, error));
    }
    sums[lane] = _mm512_castsi512_ps(sum);
  }
  return _mm512_castps_si512(reduce_rows<Add>(sums));
}

// The best codes of 16 rows with these units, minima and maxima.
template <int kInputs>
SGLANG_ER_INLINE RowCodes search(const int16_t (&units)[kRowBlock][kInputs], __m512 low, __m512 high,
                                 const RowCodes& whole) {
  const __m512i lowest = cut_units(low, whole), highest = cut_units(high, whole);
  RowCodes best = whole;
  __m512i least = _mm512_set1_epi32(-1);
  __mmask16 allowed = 0;
  for (int i = 0; i < kCandidates; ++i) {
    const Candidates of = candidates(whole, low, i);
    const __m512i range = _mm512_srai_epi32(
        _mm512_add_epi32(_mm512_mullo_epi32(of.step, _mm512_set1_epi32(static_cast<int>(kMaxLevel))),
                         _mm512_set1_epi32(1 << (kStepBits - 1))),
        kStepBits);
    const __mmask16 fits =
        _mm512_cmpge_epi32_mask(_mm512_sub_epi32(lowest, of.zero), _mm512_set1_epi32(-kOutside)) &
        _mm512_cmple_epi32_mask(_mm512_sub_epi32(_mm512_sub_epi32(highest, of.zero), range),
                                _mm512_set1_epi32(kOutside));
    if (i == 0) allowed = fits;
    const __m512i sums = squares(units, of);
    const __mmask16 better = allowed & fits & _mm512_cmplt_epu32_mask(sums, least);
    least = _mm512_mask_mov_epi32(least, better, sums);
    best.scale = _mm512_mask_mov_epi32(best.scale, better, of.codes.scale);
    best.zero = _mm512_mask_mov_epi32(best.zero, better, of.codes.zero);
    best.inverse_scale = _mm512_mask_mov_ps(best.inverse_scale, better, of.codes.inverse_scale);
  }
  return best;
}

}  // namespace
}  // namespace sglang_er::cpu::clip_rows
