// out[N, K] fp32 = q*scale + zero, the weight that a packed one stands for. Used by tests and as a slow path;
// bound by the fp32 writes, so one portable form is enough.
#pragma once

#include <cstdint>

#include "sglang_er/packed_weight.h"

namespace sglang_er::cpu {

struct DequantizeCall {
  const uint8_t* packed;         // packed_weight.h
  const uint16_t* scales_zeros;  // packed_weight.h
  PackedShape shape;
  float* out;  // [N, K], rows out_stride elements apart
  int64_t out_stride;
  int threads;
};

void dequantize(const DequantizeCall& call);

}  // namespace sglang_er::cpu
