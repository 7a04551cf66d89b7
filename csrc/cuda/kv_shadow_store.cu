// Quantizes slots of a KV pool into its shadow (kv_shadow.h has the layout and the formulas).
//
// keys, values [slots, kv_heads, dim] bf16 or fp16, slots any distance apart; int8 and fp8 take any dim that
// is a multiple of 8 up to 256, int4 multiples of 32. One warp a vector: a key or a value of one slot and
// head. A lane holds 2, 4 or 8 neighbours (rotation.h), so a vector is one load and one store a lane, and the
// transform is sums in registers and five shuffles an element. Bound: memory, 2 * dim bytes read and about
// dim / 2 (int4) or dim written a vector.
//
// Bits of the reference: same order of additions, no contraction. A slot outside the pool is left out, since
// the host cannot look at the list.
#include <tvm/ffi/string.h>

#include <cstdint>

#include "binding.h"
#include "kv_shadow_store_kernel.h"

namespace sglang_er::cuda {
namespace {

template <class T>
void launch(const KvShadowStoreParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((params.vectors + kStoreWarps - 1) / kStoreWarps);
  const int threads = kStoreWarps * kWarpLanes;
  const int dim = params.parts[0].dim > params.parts[1].dim ? params.parts[0].dim : params.parts[1].dim;
  switch (lane_elements(dim)) {
    case 2:
      return kv_shadow_store_kernel<T, 2><<<blocks, threads, 0, stream>>>(params);
    case 4:
      return kv_shadow_store_kernel<T, 4><<<blocks, threads, 0, stream>>>(params);
    default:
      return kv_shadow_store_kernel<T, 8><<<blocks, threads, 0, stream>>>(params);
  }
}

ShadowPart checked_part(const TensorView& pool, const TensorView& shadow, const TensorView& scales,
                        ShadowFormat format, bool rotated, int lane_bytes) {
  const DLDevice device = pool.device();
  for (const TensorView& tensor : {pool, shadow, scales}) check_on(tensor, device);
  const int64_t slots = pool.size(0), heads = pool.size(1), dim = pool.size(2);
  SGLANG_ER_CHECK(pool.stride(2) == 1 && (heads == 1 || pool.stride(1) == dim),
                  "slots of the pool must be contiguous");
  SGLANG_ER_CHECK(
      dim > 0 && dim <= kMaxVectorDim && dim % (format == ShadowFormat::kInt4 ? kInt4DimMultiple : 8) == 0,
      "dimensions must be multiples of 8 (int4: 32), at most 256");
  SGLANG_ER_CHECK(shadow.IsContiguous() && shadow.dtype().bits == 8 && aligned(shadow.data_ptr(), 16) &&
                      shadow.numel() == slots * heads * level_bytes_of(static_cast<int>(dim), format),
                  "the shadow does not fit the pool");
  SGLANG_ER_CHECK(scales.IsContiguous() && is_type(scales, kDLBfloat, 16) && scales.numel() == slots * heads,
                  "the shadow's scales do not fit the pool");
  const bool whole_lanes = aligned(pool.data_ptr(), lane_bytes) && pool.stride(0) * 2 % lane_bytes == 0 &&
                           dim * 2 % lane_bytes == 0;
  return {pool.data_ptr(),
          pool.stride(0),
          static_cast<int>(dim),
          whole_lanes,
          rotated,
          static_cast<uint8_t*>(shadow.data_ptr()),
          static_cast<uint16_t*>(scales.data_ptr())};
}

ShadowFormat format_named(const tvm::ffi::String& name) {
  if (name == "int8") return ShadowFormat::kInt8;
  if (name == "int4") return ShadowFormat::kInt4;
  SGLANG_ER_CHECK(name == "fp8", "the format must be int8, int4 or fp8");
  return ShadowFormat::kFp8;
}

void kv_shadow_store(TensorView keys, TensorView values, TensorView slots, tvm::ffi::String format_name,
                     TensorView shadow_keys, TensorView shadow_values, TensorView key_scales,
                     TensorView value_scales) {
  const DLDevice device = keys.device();
  check_on(values, device);
  check_on(slots, device);
  const ShadowFormat format = format_named(format_name);
  SGLANG_ER_CHECK(keys.ndim() == 3 && values.ndim() == 3 && keys.size(1) > 0 &&
                      values.size(0) == keys.size(0) && values.size(1) == keys.size(1),
                  "keys and values must be [slots, kv_heads, dim]");
  const bool half = is_type(keys, kDLFloat, 16);
  SGLANG_ER_CHECK((half && is_type(values, kDLFloat, 16)) ||
                      (is_type(keys, kDLBfloat, 16) && is_type(values, kDLBfloat, 16)),
                  "keys and values must both be bfloat16 or float16");
  SGLANG_ER_CHECK(slots.ndim() == 1 && slots.IsContiguous() && is_type(slots, kDLInt, 64),
                  "slots must be int64");
  if (slots.numel() == 0) return;
  const int64_t vectors = slots.numel() * 2 * keys.size(1);
  SGLANG_ER_CHECK(vectors <= INT32_MAX - kStoreWarps, "too many slots in one call");

  const int64_t dim = keys.size(2) > values.size(2) ? keys.size(2) : values.size(2);
  const int lane_bytes = 2 * lane_elements(static_cast<int>(dim));
  const bool int4 = format == ShadowFormat::kInt4;
  const KvShadowStoreParams params{
      {checked_part(keys, shadow_keys, key_scales, format, int4, lane_bytes),
       checked_part(values, shadow_values, value_scales, format, false, lane_bytes)},
      static_cast<const int64_t*>(slots.data_ptr()),
      static_cast<int>(vectors),
      keys.size(0),
      static_cast<int>(keys.size(1)),
      format,
      rotation_norm(static_cast<int>(keys.size(2)))};
  const OnDevice on_device(device);
  half ? launch<__half>(params, current_stream(device)) : launch<BFloat16>(params, current_stream(device));
  check_cuda(cudaGetLastError(), "kv_shadow_store");
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_shadow_store, kv_shadow_store);

}  // namespace sglang_er::cuda
