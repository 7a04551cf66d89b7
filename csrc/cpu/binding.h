// Checks that every binding shares. They keep a wrong call from touching memory; the Python wrappers check
// first and word the errors for users.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include <cstdint>

#include "dtype.h"
#include "sglang_er/packed_weight.h"

namespace sglang_er::cpu {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

#define SGLANG_ER_CHECK(condition, message) \
  if (!(condition)) TVM_FFI_THROW(ValueError) << (message)

inline DType dtype_of(const TensorView& tensor) {
  const DLDataType dtype = tensor.dtype();
  SGLANG_ER_CHECK(dtype.lanes == 1, "vector element types are not supported");
  if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::kBFloat16;
  if (dtype.code == kDLFloat && dtype.bits == 16) return DType::kFloat16;
  if (dtype.code == kDLFloat && dtype.bits == 32) return DType::kFloat32;
  TVM_FFI_THROW(TypeError) << "dtype must be bfloat16, float16 or float32";
  __builtin_unreachable();
}

inline void check_matrix(const TensorView& tensor, const char* message) {
  SGLANG_ER_CHECK(tensor.device().device_type == kDLCPU, "tensors must be on the CPU");
  SGLANG_ER_CHECK(tensor.ndim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1), message);
}

inline PackedShape packed_shape(int64_t rows, int64_t cols, int64_t group_size, const TensorView& packed,
                                const TensorView& scales_zeros) {
  SGLANG_ER_CHECK(group_size > 0 && group_size % kGroupMultiple == 0 && group_size <= kMaxGroupSize,
                  "group_size must be a multiple of 32, at most 1024");
  const PackedShape shape{rows, cols, static_cast<int>(group_size)};
  SGLANG_ER_CHECK(packed.IsContiguous() && packed.numel() == shape.packed_bytes(),
                  "packed does not fit the shape");
  SGLANG_ER_CHECK(scales_zeros.IsContiguous() && scales_zeros.numel() == shape.meta_values(),
                  "scales_zeros does not fit the shape");
  return shape;
}

inline int checked_threads(int64_t threads) {
  SGLANG_ER_CHECK(threads >= 1, "threads must be at least 1");
  return static_cast<int>(threads);
}

}  // namespace sglang_er::cpu
