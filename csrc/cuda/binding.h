// Checks that the bindings of this folder share. They keep a wrong call from touching memory; the Python
// wrappers check first and word the errors for users.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <cstdint>

#include "sglang_er/packed_weight.h"

namespace sglang_er::cuda {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

#define SGLANG_ER_CHECK(condition, message) \
  if (!(condition)) TVM_FFI_THROW(ValueError) << (message)

inline bool is_type(const TensorView& tensor, DLDataTypeCode code, int bits) {
  const DLDataType type = tensor.dtype();
  return type.code == code && type.bits == bits && type.lanes == 1;
}

inline void check_on(const TensorView& tensor, DLDevice device) {
  SGLANG_ER_CHECK(tensor.device().device_type == kDLCUDA && tensor.device().device_id == device.device_id,
                  "tensors must be on one GPU");
}

inline void check_matrix(const TensorView& tensor, DLDevice device, const char* message) {
  check_on(tensor, device);
  SGLANG_ER_CHECK(tensor.ndim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1), message);
}

inline void check_packed(const PackedShape& shape, const TensorView& packed, const TensorView& scales_zeros,
                         DLDevice device) {
  check_on(packed, device);
  check_on(scales_zeros, device);
  SGLANG_ER_CHECK(
      packed.IsContiguous() && packed.numel() == shape.packed_bytes() && is_type(packed, kDLUInt, 8),
      "packed does not fit the shape");
  SGLANG_ER_CHECK(scales_zeros.IsContiguous() && scales_zeros.numel() == shape.meta_values() &&
                      is_type(scales_zeros, kDLBfloat, 16),
                  "scales_zeros does not fit the shape");
}

inline bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Launches go to the device of the tensors; a caller's choice of another one is kept.
class OnDevice {
 public:
  explicit OnDevice(DLDevice device) {
    if (cudaGetDevice(&before_) == cudaSuccess && before_ == device.device_id) before_ = -1;
    if (before_ >= 0) cudaSetDevice(device.device_id);
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

inline cudaStream_t current_stream(DLDevice device) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

inline void check_cuda(cudaError_t error, const char* op) {
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << op << ": " << cudaGetErrorString(error);
}

}  // namespace sglang_er::cuda
