// What python/sglang_er/kernels/cpu can call: the W4A16 ops and the choice of the instruction set. Ops that
// came later bind themselves in <op>_binding.cpp.
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include "binding.h"
#include "dequantize_op.h"
#include "isa.h"
#include "quantize_pack_op.h"
#include "sglang_er/version.h"
#include "w4a16_linear_op.h"

namespace sglang_er::cpu {
namespace {

using tvm::ffi::String;

void quantize_pack_ffi(TensorView weight, TensorView packed, TensorView scales_zeros, int64_t group_size,
                       bool clip_search, int64_t threads) {
  check_matrix(weight, "weight must be a matrix with contiguous rows");
  const PackedShape shape = packed_shape(weight.size(0), weight.size(1), group_size, packed, scales_zeros);
  quantize_pack({.weight = weight.data_ptr(),
                 .weight_stride = weight.stride(0),
                 .weight_type = dtype_of(weight),
                 .packed = static_cast<uint8_t*>(packed.data_ptr()),
                 .scales_zeros = static_cast<uint16_t*>(scales_zeros.data_ptr()),
                 .shape = shape,
                 .clip_search = clip_search,
                 .threads = checked_threads(threads)});
}

void w4a16_linear_ffi(TensorView x, TensorView packed, TensorView scales_zeros, Optional<TensorView> bias,
                      TensorView out, int64_t group_size, int64_t threads) {
  check_matrix(x, "x must be a matrix with contiguous rows");
  check_matrix(out, "out must be a matrix with contiguous rows");
  const DType x_type = dtype_of(x);
  SGLANG_ER_CHECK(out.size(0) == x.size(0) && dtype_of(out) == x_type,
                  "out must have the rows and dtype of x");
  const PackedShape shape = packed_shape(out.size(1), x.size(1), group_size, packed, scales_zeros);
  const bool has_bias = bias.has_value();
  SGLANG_ER_CHECK(!has_bias || (bias.value().IsContiguous() && bias.value().numel() == shape.rows),
                  "bias must be contiguous with one value per output");
  w4a16_linear({.x = x.data_ptr(),
                .x_stride = x.stride(0),
                .x_type = x_type,
                .m = x.size(0),
                .packed = static_cast<const uint8_t*>(packed.data_ptr()),
                .scales_zeros = static_cast<const uint16_t*>(scales_zeros.data_ptr()),
                .shape = shape,
                .bias = has_bias ? bias.value().data_ptr() : nullptr,
                .bias_type = has_bias ? dtype_of(bias.value()) : x_type,
                .out = out.data_ptr(),
                .out_stride = out.stride(0),
                .out_type = x_type,
                .threads = checked_threads(threads)});
}

void dequantize_ffi(TensorView packed, TensorView scales_zeros, TensorView out, int64_t group_size,
                    int64_t threads) {
  check_matrix(out, "out must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(dtype_of(out) == DType::kFloat32, "out must be float32");
  const PackedShape shape = packed_shape(out.size(0), out.size(1), group_size, packed, scales_zeros);
  dequantize({.packed = static_cast<const uint8_t*>(packed.data_ptr()),
              .scales_zeros = static_cast<const uint16_t*>(scales_zeros.data_ptr()),
              .shape = shape,
              .out = static_cast<float*>(out.data_ptr()),
              .out_stride = out.stride(0),
              .threads = checked_threads(threads)});
}

String isa_ffi() { return String(std::string(isa_name(active_isa()))); }

String supported_isas_ffi() {
  std::string names;
  for (Isa isa : supported_isas()) names.append(names.empty() ? "" : " ").append(isa_name(isa));
  return String(names);
}

void set_isa_ffi(String name) {
  try {
    set_isa(name);
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  }
}

int64_t library_version_ffi() { return kLibraryVersion; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_pack, quantize_pack_ffi);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(w4a16_linear, w4a16_linear_ffi);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantize, dequantize_ffi);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(isa, isa_ffi);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(supported_isas, supported_isas_ffi);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_isa, set_isa_ffi);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(library_version, library_version_ffi);

}  // namespace sglang_er::cpu
