// Clip search: which range of a group's weights loses least when int4 has only 16 levels for it. What lies
// outside is cut to the lowest or highest level, what lies inside gets a finer step.
//
// Candidate c cuts bottom(c) / 64 and top(c) / 64 of the range off its ends. From the scale s and zero z that
// quantize.h gives the whole range, and its minimum lo:
//
//   scale = max(bf16(s * (64 - bottom - top) / 64), 2^-126)     zero = bf16(lo + s * 15 * bottom / 64)
//
// Candidate 0 is the whole range. The one with the least sum of squared errors is taken, of equals the first:
// ranges never grow from one candidate to the next. Errors are integers, so that the order of a sum does not
// matter: in units of s / 1024, with everything in 16 bits (">>" rounds down),
//
//   v = rint(1024 (w - z) / s)      a = v - rint(1024 (zero - z) / s)
//   S = rint(2^14 scale / s)        M = rint(2^14 s / scale)
//   q = clamp((((a M + 2^14) >> 15) + 2^8) >> 9, 0, 15)      error = a - ((q S + 8) >> 4)
//
// where "/ s" and "/ scale" multiply by the reciprocal, in fp32 without contraction. A candidate that leaves
// a weight more than 1440 units (1.4 steps) outside of its levels is not taken, so squares of 1024 weights
// fit 31 bits; where that is so of the whole range, it is kept unsearched (fp16 and fp32 only: weights so
// close together that their zero, rounded to bf16, lies outside of them).
#pragma once

#include <bit>
#include <cstdint>

#include "sglang_er/quantize.h"

namespace sglang_er::clip {

inline constexpr int kCandidates = 8;
inline constexpr float kUnits = 1024.0f;   // of a step
inline constexpr int kOutside = 1440;      // units
inline constexpr float kLowest = -4.0f;    // steps; beyond kOutside, so that cutting there changes nothing
inline constexpr float kHighest = 19.0f;   // steps
inline constexpr float kRatio = 16384.0f;  // unit of scale / s and of s / scale
inline constexpr int kLevelBits = 9;       // fraction bits of a level before it is rounded
inline constexpr int kStepBits = 4;        // that S has more than an error
inline constexpr float kCut = 0x1p-6f;     // of the range
inline constexpr uint32_t kBottoms = 0x32302100u;  // a nibble a candidate, the first one lowest
inline constexpr uint32_t kTops = 0x23030120u;

SGLANG_ER_INLINE int bottom(int candidate) { return static_cast<int>(kBottoms >> 4 * candidate & 15); }
SGLANG_ER_INLINE int top(int candidate) { return static_cast<int>(kTops >> 4 * candidate & 15); }
// Factors of s, exact: of the candidate's scale, and of what its zero lies above lo.
SGLANG_ER_INLINE float width(int candidate) {
  return static_cast<float>(64 - bottom(candidate) - top(candidate)) * kCut;
}
SGLANG_ER_INLINE float raise(int candidate) { return static_cast<float>(15 * bottom(candidate)) * kCut; }

struct Candidate {
  GroupCode code;
  int zero;     // units above z
  int step;     // S
  int inverse;  // M
};

struct Search {
  float lo;
  GroupCode whole;
  int low, high;  // units of the least and the largest weight
  bool allowed;   // whether there is anything to search
  GroupCode best;
  uint32_t least;
};

SGLANG_ER_INLINE int round_even(float x) {  // |x| < 2^22
  constexpr float kRound = 0x1.8p23f;       // adding it leaves no fraction bits
  return std::bit_cast<int>(x + kRound) - 0x4B400000;
}

// A quotient of two scales, 1 or near it.
SGLANG_ER_INLINE int ratio(float x) {
  x = x > 0.0f ? x : 0.0f;  // also takes NaN to 0
  return round_even((x < 2.0f ? x : 2.0f) * kRatio);
}

// v of a weight; NaN is the lowest.
SGLANG_ER_INLINE int units(float weight, const GroupCode& whole) {
  float steps = (weight - whole.zero) * whole.inverse_scale;
  steps = steps > kLowest ? steps : kLowest;
  steps = steps < kHighest ? steps : kHighest;
  return round_even(steps * kUnits);
}

SGLANG_ER_INLINE Search begin(float lo, float hi, const GroupCode& whole) {
  return {lo, whole, units(lo, whole), units(hi, whole), true, whole, 0xFFFFFFFFu};
}

SGLANG_ER_INLINE Candidate candidate(const Search& search, int index) {
  const GroupCode& whole = search.whole;
  const float s = bf16_to_float(whole.scale_bits);
  const uint16_t rounded = float_to_bf16(s * width(index));
  const uint16_t scale_bits = rounded < kMinScaleBits ? kMinScaleBits : rounded;
  uint16_t zero_bits = float_to_bf16(search.lo + s * raise(index));  // the product is exact, and never -0
  if ((zero_bits & 0x7FFF) == kBf16Infinity) --zero_bits;
  const float scale = bf16_to_float(scale_bits), zero = bf16_to_float(zero_bits), inverse = 1.0f / scale;
  return {{scale_bits, zero_bits, inverse, zero},
          units(zero, whole),
          ratio(scale * whole.inverse_scale),
          ratio(s * inverse)};
}

// Error of a weight of `value` units.
SGLANG_ER_INLINE int error(int value, const Candidate& of) {
  const int above = value - of.zero;
  const int level = (above * of.inverse + (1 << 14)) >> 15;
  int rounded = (level + (1 << (kLevelBits - 1))) >> kLevelBits;
  rounded = rounded > 0 ? rounded : 0;
  rounded = rounded < static_cast<int>(kMaxLevel) ? rounded : static_cast<int>(kMaxLevel);
  return above - ((rounded * of.step + (1 << (kStepBits - 1))) >> kStepBits);
}

SGLANG_ER_INLINE uint32_t square(int error) { return static_cast<uint32_t>(error * error); }

// Takes candidate `index`, which comes after those before it, if it is the best one so far.
SGLANG_ER_INLINE void compare(Search& search, int index, const Candidate& of, uint32_t squares) {
  const int levels = (static_cast<int>(kMaxLevel) * of.step + (1 << (kStepBits - 1))) >> kStepBits;
  const bool fits = search.low - of.zero >= -kOutside && search.high - of.zero - levels <= kOutside;
  if (index == 0) search.allowed = fits;
  if (!search.allowed || !fits || squares >= search.least) return;
  search.least = squares;
  search.best = of.code;
}

}  // namespace sglang_er::clip
