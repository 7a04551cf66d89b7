// In the place of CUDA's own.
#pragma once

#include "sglang_er/bfloat16.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {sglang_er::float_to_bf16(value)}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
