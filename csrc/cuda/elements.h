// Elements of weights and pools as a kernel reads them.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "sglang_er/bfloat16.h"

namespace sglang_er::cuda {

struct BFloat16 {
  uint16_t bits;
};
__device__ __forceinline__ float to_float(BFloat16 value) { return bf16_to_float(value.bits); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(float value) { return value; }

}  // namespace sglang_er::cuda
