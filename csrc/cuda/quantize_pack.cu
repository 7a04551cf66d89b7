// quantize_pack: a weight [N, K], bf16, fp16 or fp32, to int4 in groups of 64 or 128 (quantize.h has the
// rule, packed_weight.h the layout). Rows may lie any distance apart.
//
// One warp a block of 16 rows and a group; quantize_lane.h says which lane takes what. One pass: a weight is
// read once, into registers, and every packed byte written once. Neighbouring warps take neighbouring groups,
// so a row is read in whole lines. Bound: memory, 2 (or 4) bytes read and 0.53 written a weight; at four
// 16-byte loads a lane and 32 warps a multiprocessor, 64 KB are under way.
//
// Clip search (clip_search.h), by a template argument, so that without it nothing is there of it: units of
// the lane's 32 numbers in registers, about 10 integer operations a weight and candidate: that, not memory,
// is then the bound.
//
// Bits of the reference: no contraction (the build forbids it), divisions rounded to nearest.
#include "binding.h"
#include "quantize_pack_kernel.h"

namespace sglang_er::cuda {
namespace {

template <class T, bool ClipSearch>
void launch(const QuantizeParams& params, cudaStream_t stream) {
  const int64_t items = params.shape.row_blocks() * params.shape.groups();
  const auto blocks = static_cast<unsigned>((items + kPackWarps - 1) / kPackWarps);
  if (params.shape.group_size == 128) {
    quantize_pack_kernel<T, 128, ClipSearch><<<blocks, kPackWarps * 32, 0, stream>>>(params);
  } else {
    quantize_pack_kernel<T, 64, ClipSearch><<<blocks, kPackWarps * 32, 0, stream>>>(params);
  }
  check_cuda(cudaGetLastError(), "quantize_pack");
}

template <class T>
void launch(const QuantizeParams& params, bool clip_search, cudaStream_t stream) {
  clip_search ? launch<T, true>(params, stream) : launch<T, false>(params, stream);
}

void quantize_pack(TensorView weight, TensorView packed, TensorView scales_zeros, int64_t group_size,
                   bool clip_search) {
  const DLDevice device = weight.device();
  check_matrix(weight, device, "weight must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(group_size == 64 || group_size == 128, "group_size must be 64 or 128");
  const PackedShape shape{weight.size(0), weight.size(1), static_cast<int>(group_size)};
  check_packed(shape, packed, scales_zeros, device);
  SGLANG_ER_CHECK(aligned(packed.data_ptr(), 16), "packed must begin at a multiple of 16 bytes");
  SGLANG_ER_CHECK(shape.row_blocks() * shape.groups() <= INT32_MAX - kPackWarps, "the weight is too large");
  if (shape.packed_bytes() == 0) return;
  const QuantizeParams params{
      .weight = weight.data_ptr(),
      .stride = weight.stride(0),
      .aligned = aligned(weight.data_ptr(), 16) && weight.stride(0) * (weight.dtype().bits / 8) % 16 == 0,
      .shape = shape,
      .packed = static_cast<uint8_t*>(packed.data_ptr()),
      .scales_zeros = static_cast<uint16_t*>(scales_zeros.data_ptr())};
  const OnDevice on_device(device);
  const cudaStream_t stream = current_stream(device);
  if (is_type(weight, kDLBfloat, 16)) {
    launch<BFloat16>(params, clip_search, stream);
  } else if (is_type(weight, kDLFloat, 16)) {
    launch<__half>(params, clip_search, stream);
  } else if (is_type(weight, kDLFloat, 32)) {
    launch<float>(params, clip_search, stream);
  } else {
    TVM_FFI_THROW(TypeError) << "weight must be bfloat16, float16 or float32";
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_pack, quantize_pack);

}  // namespace sglang_er::cuda
