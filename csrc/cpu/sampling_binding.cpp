#include <tvm/ffi/function.h>

#include "binding.h"
#include "sampling_op.h"

namespace sglang_er::cpu {
namespace {

// [rows, size] or [rows, width, size]
Weights checked_weights(const TensorView& tensor, int64_t rows, int64_t size) {
  SGLANG_ER_CHECK(tensor.device().device_type == kDLCPU && dtype_of(tensor) == DType::kFloat32,
                  "weights must be float32 on the CPU");
  const int dims = tensor.ndim();
  SGLANG_ER_CHECK(dims == 2 || dims == 3, "weights must be [rows, size] or [rows, width, size]");
  SGLANG_ER_CHECK(tensor.size(0) == rows && tensor.size(dims - 1) == size && size > 0,
                  "weights do not fit the output");
  SGLANG_ER_CHECK(size == 1 || tensor.stride(dims - 1) == 1, "weights must have contiguous rows");
  return {.data = static_cast<const float*>(tensor.data_ptr()),
          .row_stride = tensor.stride(0),
          .width = dims == 3 ? tensor.size(1) : 1,
          .width_stride = dims == 3 ? tensor.stride(1) : 0};
}

void check_vector(const TensorView& tensor, int64_t rows, uint8_t code, const char* message) {
  const DLDataType dtype = tensor.dtype();
  SGLANG_ER_CHECK(tensor.device().device_type == kDLCPU && dtype.code == code && dtype.bits == 64 &&
                      tensor.ndim() == 1 && tensor.size(0) == rows && tensor.IsContiguous(),
                  message);
}

void sample_rows_ffi(TensorView weights, Optional<TensorView> subtract, Optional<TensorView> offsets,
                     TensorView coins, TensorView out, int64_t threads) {
  SGLANG_ER_CHECK(out.ndim() == 1, "out must be a vector");
  const int64_t rows = out.size(0);
  const int64_t size = weights.size(weights.ndim() - 1);
  check_vector(out, rows, kDLInt, "out must be contiguous int64 [rows]");
  check_vector(coins, rows, kDLFloat, "coins must be contiguous float64 [rows]");
  SampleRowsCall call{.weights = checked_weights(weights, rows, size),
                      .subtract = {},
                      .offsets = nullptr,
                      .coins = static_cast<const double*>(coins.data_ptr()),
                      .rows = rows,
                      .size = size,
                      .out = static_cast<int64_t*>(out.data_ptr()),
                      .threads = checked_threads(threads)};
  if (subtract.has_value()) call.subtract = checked_weights(subtract.value(), rows, size);
  if (offsets.has_value()) {
    check_vector(offsets.value(), rows, kDLInt, "offsets must be contiguous int64 [rows]");
    call.offsets = static_cast<const int64_t*>(offsets.value().data_ptr());
    for (int64_t row = 0; row < rows; ++row)
      SGLANG_ER_CHECK(call.offsets[row] >= 0 && call.offsets[row] < call.weights.width,
                      "offsets must be less than the width of weights");
  }
  sample_rows(call);
}

void softmax_rows_ffi(TensorView logits, TensorView temperatures, TensorView out, int64_t threads) {
  check_matrix(logits, "logits must be a matrix with contiguous rows");
  check_matrix(out, "out must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(
      out.size(0) == logits.size(0) && out.size(1) == logits.size(1) && dtype_of(out) == DType::kFloat32,
      "out must be float32 with the shape of logits");
  SGLANG_ER_CHECK(dtype_of(temperatures) == DType::kFloat32 && temperatures.IsContiguous() &&
                      temperatures.numel() == logits.size(0),
                  "temperatures must be contiguous float32 with one value per row");
  softmax_rows({.logits = logits.data_ptr(),
                .stride = logits.stride(0),
                .type = dtype_of(logits),
                .temperatures = static_cast<const float*>(temperatures.data_ptr()),
                .rows = logits.size(0),
                .size = logits.size(1),
                .out = static_cast<float*>(out.data_ptr()),
                .out_stride = out.stride(0),
                .threads = checked_threads(threads)});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_rows, sample_rows_ffi);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(softmax_rows, softmax_rows_ffi);

}  // namespace sglang_er::cpu
