// The arithmetic of kv_shadow.h for the GPU: one vector across the lanes of a warp, as in rotation.h.
//
// Each operation rounds once (nothing is contracted into a fused multiply-add), so that levels and scales
// have the bits of the reference.
#pragma once

#include <cmath>
#include <cstdint>

#include "sglang_er/bfloat16.h"
#include "sglang_er/fp8.h"
#include "sglang_er/kv_shadow.h"
#include "sglang_er/macros.h"

namespace sglang_er {

struct ShadowRule {
  float steps;
  float shift;
  float low;
  float high;
};
inline constexpr uint16_t kMinShadowScaleBits = 0x0080;  // 2^-126

SGLANG_ER_INLINE ShadowRule shadow_rule(ShadowFormat format) {
  switch (format) {
    case ShadowFormat::kInt8:
      return {127.0f, 0.0f, -127.0f, 127.0f};
    case ShadowFormat::kInt4:
      return {8.0f, 7.5f, 0.0f, 15.0f};
    default:
      return {kLargestFp8, 0.0f, -kLargestFp8, kLargestFp8};
  }
}

// Bits of the scale of a vector whose largest magnitude is `largest`.
SGLANG_ER_INLINE uint16_t shadow_scale_bits(float largest, ShadowFormat format) {
  const ShadowRule rule = shadow_rule(format);
#if defined(__CUDA_ARCH__)
  const uint16_t rounded = float_to_bf16(__fdiv_rn(largest, rule.steps));
#else
  const uint16_t rounded = float_to_bf16(largest / rule.steps);
#endif
  return rounded < kMinShadowScaleBits ? kMinShadowScaleBits : rounded;
}

SGLANG_ER_INLINE float shadow_inverse_scale(uint16_t scale_bits) {
#if defined(__CUDA_ARCH__)
  return __frcp_rn(bf16_to_float(scale_bits));
#else
  return 1.0f / bf16_to_float(scale_bits);
#endif
}

// A level of int8 or int4, or an fp8 code.
SGLANG_ER_INLINE int shadow_level(float value, float inverse, ShadowFormat format) {
  const ShadowRule rule = shadow_rule(format);
#if defined(__CUDA_ARCH__)
  const float scaled = __fmul_rn(value, inverse);
  if (format == ShadowFormat::kFp8) return float_to_fp8(scaled);
  const float level = rintf(__fadd_rn(scaled, rule.shift));
#else
  const float scaled = value * inverse;
  if (format == ShadowFormat::kFp8) return float_to_fp8(scaled);
  const float level = std::nearbyint(scaled + rule.shift);
#endif
  return static_cast<int>(level < rule.low ? rule.low : level > rule.high ? rule.high : level);
}

// A lane's E levels of an int4 key: E / 2 bytes, which belong at byte lane * E / 2 of the key.
template <int E>
SGLANG_ER_INLINE uint32_t key_nibbles(const int (&levels)[E]) {
  uint32_t packed = 0;
  for (int i = 0; i < E; ++i) packed |= static_cast<uint32_t>(levels[i]) << (4 * i);
  return packed;
}

// A lane's E levels as E bytes: those of an int8 or fp8 vector, or halves of the bytes of an int4 value.
template <int E>
SGLANG_ER_INLINE uint64_t level_bytes(const int (&levels)[E]) {
  uint64_t packed = 0;
  for (int i = 0; i < E; ++i) packed |= static_cast<uint64_t>(static_cast<uint8_t>(levels[i])) << (8 * i);
  return packed;
}

// int4 values: the lane that owns the first sixteen dimensions of a block of 32 joins its levels with those
// of lane ^ value_partner<E>() and writes E bytes at value_byte<E>(lane).
template <int E>
SGLANG_ER_INLINE constexpr int value_partner() {
  return 16 / E;
}
template <int E>
SGLANG_ER_INLINE bool writes_value(int lane) {
  return lane * E % 32 < 16;
}
template <int E>
SGLANG_ER_INLINE int value_byte(int lane) {
  return lane * E / 32 * 16 + lane * E % 32;
}
SGLANG_ER_INLINE uint64_t value_nibbles(uint64_t own, uint64_t partner) { return own | partner << 4; }

}  // namespace sglang_er
