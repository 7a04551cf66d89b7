// The rule of asymmetric round-to-nearest int4, for one group of weights.
//
//   scale = max(bf16(hi/15 - lo/15), 2^-126)    zero = bf16(lo)    q = clamp(rint((w - zero) * (1/scale)), 0,
//   15)
//
// lo and hi are the group's minimum and maximum; q is computed from the stored (rounded) scale and zero, in
// fp32 without contraction, rounding half to even. hi and lo are divided before they are subtracted so that
// the scale of finite weights is finite; the floor keeps 1/scale finite, so a constant group is q = 0, zero =
// its value. A zero that would round to infinity becomes the largest finite bf16. Weights must be finite.
#pragma once

#include <cstdint>

#include "sglang_er/bfloat16.h"
#include "sglang_er/macros.h"

namespace sglang_er {

inline constexpr float kMaxLevel = 15.0f;
inline constexpr uint16_t kMinScaleBits = 0x0080;  // 2^-126
inline constexpr uint16_t kBf16Infinity = 0x7F80;

struct GroupCode {
  uint16_t scale_bits;
  uint16_t zero_bits;
  float inverse_scale;
  float zero;
};

SGLANG_ER_INLINE GroupCode group_code(float lo, float hi) {
  const uint16_t rounded = float_to_bf16(hi / kMaxLevel - lo / kMaxLevel);
  const uint16_t scale = rounded < kMinScaleBits ? kMinScaleBits : rounded;
  uint16_t zero = float_to_bf16(lo + 0.0f);  // -0 becomes +0
  if ((zero & 0x7FFF) == kBf16Infinity) --zero;
  return {scale, zero, 1.0f / bf16_to_float(scale), bf16_to_float(zero)};
}

SGLANG_ER_INLINE int quantize_value(float weight, const GroupCode& code) {
  float level = (weight - code.zero) * code.inverse_scale;
  level = level > 0.0f ? level : 0.0f;  // also takes NaN to 0
  level = level < kMaxLevel ? level : kMaxLevel;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves no fraction bits: rounds half to even
  return static_cast<int>((level + kRound) - kRound);
}

}  // namespace sglang_er
