// The call of w4a8_linear, as the bindings and the decoder hand it to the kernel of the active instruction
// set.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "sglang_er/packed_weight.h"

namespace sglang_er::cpu {

struct W4A8Call {
  const void* x;  // [M, K], x_type, rows x_stride elements apart
  int64_t x_stride;
  DType x_type;
  int64_t m;
  const uint8_t* packed;         // packed_weight.h
  const uint16_t* scales_zeros;  // packed_weight.h
  PackedShape shape;
  const void* bias;  // [N] or null
  DType bias_type;
  void* out;  // [M, N], rows out_stride elements apart
  int64_t out_stride;
  DType out_type;
  int threads;
};

void w4a8_linear(const W4A8Call& call);  // the active instruction set

void w4a8_linear_portable(const W4A8Call& call);
void w4a8_linear_avx2(const W4A8Call& call);
void w4a8_linear_avx512_vnni(const W4A8Call& call);

}  // namespace sglang_er::cpu
