// The call of bf16_linear, as the bindings and the decoder hand it to the kernel of the active instruction
// set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace sglang_er::cpu {

struct Bf16LinearCall {
  const void* x;  // [M, K], x_type, rows x_stride elements apart
  int64_t x_stride;
  DType x_type;
  int64_t m;
  const void* weight;  // [N, K], weight_type, rows weight_stride elements apart: the live parameter itself
  int64_t weight_stride;
  DType weight_type;
  int64_t n;
  int64_t k;
  const void* bias;  // [N] or null
  DType bias_type;
  void* out;  // [M, N], rows out_stride elements apart
  int64_t out_stride;
  DType out_type;
  int threads;
};

// Calls run(pass) for parts of nearly equal size, of at most `rows` rows of x.
template <class Run>
SGLANG_ER_INLINE void in_passes(const Bf16LinearCall& call, int64_t rows, const Run& run) {
  const int64_t passes = (call.m + rows - 1) / rows;
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t first = call.m * i / passes;
    Bf16LinearCall pass = call;
    pass.m = call.m * (i + 1) / passes - first;
    pass.x = static_cast<const char*>(call.x) + first * call.x_stride * element_bytes(call.x_type);
    pass.out = static_cast<char*>(call.out) + first * call.out_stride * element_bytes(call.out_type);
    run(pass);
  }
}

void bf16_linear(const Bf16LinearCall& call);  // the active instruction set

void bf16_linear_portable(const Bf16LinearCall& call);
void bf16_linear_avx2(const Bf16LinearCall& call);
void bf16_linear_avx512(const Bf16LinearCall& call);
void bf16_linear_avx512_bf16(const Bf16LinearCall& call);
void bf16_linear_amx(const Bf16LinearCall& call);

}  // namespace sglang_er::cpu
