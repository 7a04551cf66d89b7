// The call of the linear ops with packed int4 weights (w4a16_linear, w4a8_linear).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "sglang_er/packed_weight.h"

namespace sglang_er::cpu {

struct W4LinearCall {
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

// Rows of x handled by one pass over the weight: enough that arithmetic and not the memory is the limit, few
// enough that the rearranged activations stay in cache.
inline constexpr int64_t kRowsPerPass = 128;

template <class Kernel>
void in_passes(const W4LinearCall& call, const Kernel& kernel) {
  for (int64_t row = 0; row < call.m; row += kRowsPerPass) {
    W4LinearCall pass = call;
    pass.x = static_cast<const char*>(call.x) + row * call.x_stride * element_bytes(call.x_type);
    pass.out = static_cast<char*>(call.out) + row * call.out_stride * element_bytes(call.out_type);
    pass.m = call.m - row < kRowsPerPass ? call.m - row : kRowsPerPass;
    kernel(pass);
  }
}

}  // namespace sglang_er::cpu
