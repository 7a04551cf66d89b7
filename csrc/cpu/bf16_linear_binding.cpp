#include <tvm/ffi/function.h>

#include "bf16_linear_op.h"
#include "binding.h"

namespace sglang_er::cpu {
namespace {

void bf16_linear_ffi(TensorView x, TensorView weight, Optional<TensorView> bias, TensorView out,
                     int64_t threads) {
  check_matrix(x, "x must be a matrix with contiguous rows");
  check_matrix(weight, "weight must be a matrix with contiguous rows");
  check_matrix(out, "out must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(weight.size(1) == x.size(1), "weight must have as many columns as x");
  SGLANG_ER_CHECK(out.size(0) == x.size(0) && out.size(1) == weight.size(0),
                  "out must have the rows of x and a column per row of weight");
  const bool has_bias = bias.has_value();
  SGLANG_ER_CHECK(!has_bias || (bias.value().IsContiguous() && bias.value().numel() == weight.size(0)),
                  "bias must be contiguous with one value per output");
  bf16_linear({.x = x.data_ptr(),
               .x_stride = x.stride(0),
               .x_type = dtype_of(x),
               .m = x.size(0),
               .weight = weight.data_ptr(),
               .weight_stride = weight.stride(0),
               .weight_type = dtype_of(weight),
               .n = weight.size(0),
               .k = x.size(1),
               .bias = has_bias ? bias.value().data_ptr() : nullptr,
               .bias_type = has_bias ? dtype_of(bias.value()) : DType::kFloat32,
               .out = out.data_ptr(),
               .out_stride = out.stride(0),
               .out_type = dtype_of(out),
               .threads = checked_threads(threads)});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bf16_linear, bf16_linear_ffi);

}  // namespace sglang_er::cpu
