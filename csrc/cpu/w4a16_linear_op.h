// The call of w4a16_linear, as the bindings hand it to the kernel of the active instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "sglang_er/packed_weight.h"

namespace sglang_er::cpu {

struct W4A16Call {
  const void* x;  // [M, K], x_type, rows x_stride elements apart
  int64_t x_stride;
  DType x_type;  // of x and of out
  int64_t m;
  const uint8_t* packed;         // packed_weight.h
  const uint16_t* scales_zeros;  // packed_weight.h
  PackedShape shape;
  const void* bias;  // [N] or null
  DType bias_type;
  void* out;  // [M, N], rows out_stride elements apart
  int64_t out_stride;
  int threads;
};

void w4a16_linear(const W4A16Call& call);  // the active instruction set

void w4a16_linear_portable(const W4A16Call& call);
void w4a16_linear_avx2(const W4A16Call& call);
void w4a16_linear_avx512(const W4A16Call& call);
void w4a16_linear_avx512_bf16(const W4A16Call& call);  // bf16 x only

}  // namespace sglang_er::cpu
