// w4a8_linear for python/sglang_er/kernels/cpu.
#include <tvm/ffi/function.h>

#include "binding.h"
#include "w4a8_linear_op.h"

namespace sglang_er::cpu {
namespace {

void w4a8_linear_ffi(TensorView x, TensorView packed, TensorView scales_zeros, Optional<TensorView> bias,
                     TensorView out, int64_t group_size, int64_t threads) {
  check_matrix(x, "x must be a matrix with contiguous rows");
  check_matrix(out, "out must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(out.size(0) == x.size(0), "out must have the rows of x");
  const PackedShape shape = packed_shape(out.size(1), x.size(1), group_size, packed, scales_zeros);
  const bool has_bias = bias.has_value();
  SGLANG_ER_CHECK(!has_bias || (bias.value().IsContiguous() && bias.value().numel() == shape.rows),
                  "bias must be contiguous with one value per output");
  w4a8_linear({.x = x.data_ptr(),
               .x_stride = x.stride(0),
               .x_type = dtype_of(x),
               .m = x.size(0),
               .packed = static_cast<const uint8_t*>(packed.data_ptr()),
               .scales_zeros = static_cast<const uint16_t*>(scales_zeros.data_ptr()),
               .shape = shape,
               .bias = has_bias ? bias.value().data_ptr() : nullptr,
               .bias_type = has_bias ? dtype_of(bias.value()) : DType::kFloat32,
               .out = out.data_ptr(),
               .out_stride = out.stride(0),
               .out_type = dtype_of(out),
               .threads = checked_threads(threads)});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(w4a8_linear, w4a8_linear_ffi);

}  // namespace sglang_er::cpu
