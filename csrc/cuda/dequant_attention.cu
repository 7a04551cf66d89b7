// paged_attention for decoding, from an int4 shadow: softmax(scale * q K^T) V of every token of q over what
// it sees.
//
// Slots with their flag in `valid` before the newest `exact_newest` positions of a context are read from the
// shadow (Dim + 4 bytes a token and head), the others from the bf16 pool. Bound: memory, the shadow of a KV
// head is read once for its whole group of query heads.
//
// Who computes what. attend: resident blocks of four warps take items (split_schedule.h), a chunk of one
// token's context and one KV head. Each warp takes every fourth step of 32 tokens, with copies of the next
// two or three steps under way (8 KB and more a warp, at least 32 KB a block; three or more blocks an SM),
// keeps its own online softmax, and at the end the four are merged, warp by warp in order, into a partial
// result. combine: one warp a query head merges the partial results in the order of the chunks. No atomics,
// no host synchronization, nothing that depends on the other tokens of the batch.
#include <atomic>
#include <cstdint>

#include "binding.h"
#include "dequant_attention_kernel.h"

namespace sglang_er::cuda {
namespace {

void check_launch(cudaError_t error) { check_cuda(error, "dequant_attention"); }

// Blocks that are resident on the device at once; how many there are changes who computes, not what.
template <int Dim, int HeadTiles>
int resident_blocks(int device) {
  static std::atomic<int> known[64];
  if (device >= 0 && device < 64 && known[device] != 0) return known[device];
  int processors = 0, each = 0;
  const auto kernel = attend<Dim, HeadTiles>;
  constexpr int kBytes = sizeof(Shared<Dim, HeadTiles>);
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  check_launch(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_launch(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kWarps * 32, kBytes));
  SGLANG_ER_CHECK(each > 0, "the device has too little shared memory");
  if (device >= 0 && device < 64) known[device] = processors * each;
  return processors * each;
}

template <int Dim, int HeadTiles>
void launch(const DequantAttentionParams& params, bool out_is_float, int device, cudaStream_t stream) {
  const int resident = resident_blocks<Dim, HeadTiles>(device);
  const int64_t most = int64_t{params.tokens} * params.kv_heads * params.chunks;
  const int blocks = most < resident ? static_cast<int>(most) : resident;
  attend<Dim, HeadTiles><<<blocks, kWarps * 32, sizeof(Shared<Dim, HeadTiles>), stream>>>(params);
  check_launch(cudaGetLastError());
  const dim3 grid(params.kv_heads, params.tokens);
  if (out_is_float) {
    combine<Dim, float><<<grid, params.group * 32, 0, stream>>>(params);
  } else {
    combine<Dim, uint16_t><<<grid, params.group * 32, 0, stream>>>(params);
  }
  check_launch(cudaGetLastError());
}

// [any, heads, dim] with contiguous rows; loads of 16 bytes must be aligned.
void check_heads(const TensorView& tensor, DLDevice device, const char* message) {
  check_on(tensor, device);
  SGLANG_ER_CHECK(tensor.ndim() == 3 && tensor.stride(2) == 1 &&
                      (tensor.size(1) == 1 || tensor.stride(1) == tensor.size(2)) &&
                      aligned(tensor.data_ptr(), 16) && tensor.stride(0) % 8 == 0,
                  message);
}

// Exactly `count` elements of a type, contiguous, aligned to `bytes`.
template <class T>
T* elements(const TensorView& tensor, DLDevice device, DLDataTypeCode code, int bytes, int64_t count,
            const char* message) {
  check_on(tensor, device);
  SGLANG_ER_CHECK(is_type(tensor, code, 8 * sizeof(T)) && tensor.IsContiguous() && tensor.numel() == count &&
                      aligned(tensor.data_ptr(), bytes),
                  message);
  return static_cast<T*>(tensor.data_ptr());
}

template <int Dim>
void launch(const DequantAttentionParams& params, bool out_is_float, int device, cudaStream_t stream) {
  if (params.group <= kTileHeads) return launch<Dim, 1>(params, out_is_float, device, stream);
  launch<Dim, 2>(params, out_is_float, device, stream);
}

void dequant_attention(TensorView q, TensorView keys, TensorView values, TensorView req_to_token,
                       TensorView rows, TensorView query_begin, TensorView context_lens, double scale,
                       TensorView shadow_keys, TensorView shadow_values, TensorView key_scales,
                       TensorView value_scales, TensorView valid, int64_t exact_newest,
                       TensorView partial_values, TensorView partial_sums, TensorView out) {
  const DLDevice device = q.device();
  check_heads(q, device, "q must be [tokens, heads, head_dim], contiguous and aligned");
  check_heads(keys, device, "keys must be [slots, kv_heads, head_dim], contiguous and aligned");
  check_heads(values, device, "values must be [slots, kv_heads, head_dim], contiguous and aligned");
  check_heads(out, device, "out must be [tokens, heads, head_dim], contiguous and aligned");
  SGLANG_ER_CHECK(is_type(q, kDLBfloat, 16) && is_type(keys, kDLBfloat, 16) && is_type(values, kDLBfloat, 16),
                  "q, keys and values must be bfloat16");
  const bool out_is_float = is_type(out, kDLFloat, 32);
  SGLANG_ER_CHECK(out_is_float || is_type(out, kDLBfloat, 16), "out must be bfloat16 or float32");
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  const int64_t slots = keys.size(0), kv_heads = keys.size(1), requests = rows.numel();
  SGLANG_ER_CHECK(kv_heads > 0 && heads % kv_heads == 0 && heads > 0 && heads / kv_heads <= 2 * kTileHeads,
                  "query heads must be 1 to 16 times the KV heads");
  SGLANG_ER_CHECK((dim == 64 || dim == 128) && keys.size(2) == dim && values.size(2) == dim &&
                      values.size(0) == slots && values.size(1) == kv_heads,
                  "head_dim and value_dim must be 64 or 128, and those of the pool");
  SGLANG_ER_CHECK(out.size(0) == tokens && out.size(1) == heads && out.size(2) == dim,
                  "out must have the shape of q");
  SGLANG_ER_CHECK(tokens <= kMaxScheduledTokens, "too many tokens in one call");
  check_matrix(req_to_token, device, "req_to_token must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(is_type(req_to_token, kDLInt, 32) && req_to_token.size(1) <= kMaxScheduledContext,
                  "req_to_token must be int32 with at most 2^30 columns");
  SGLANG_ER_CHECK(exact_newest >= 0 && exact_newest <= INT32_MAX, "exact_newest must not be negative");
  if (tokens == 0) return;
  const int chunks = most_chunks(req_to_token.size(1));
  const auto levels = [&](const TensorView& tensor) {
    return elements<uint8_t>(tensor, device, kDLUInt, 16, slots * kv_heads * dim / 2,
                             "the shadow's keys and values do not fit the pool");
  };
  const auto scales = [&](const TensorView& tensor) {
    return elements<uint16_t>(tensor, device, kDLBfloat, 2, slots * kv_heads,
                              "the shadow's scales do not fit the pool");
  };
  const auto int64s = [&](const TensorView& tensor, int64_t count) {
    return elements<int64_t>(
        tensor, device, kDLInt, 8, count,
        "rows, query_begin and context_lens must be int64 [requests], [requests + 1], [requests]");
  };
  const auto workspace = [&](const TensorView& tensor, int64_t width) {
    return elements<float>(tensor, device, kDLFloat, 16, tokens * heads * chunks * width,
                           "the workspace does not fit the call");
  };
  const DequantAttentionParams params{
      .q = static_cast<const uint16_t*>(q.data_ptr()),
      .q_stride = q.stride(0),
      .keys = static_cast<const uint16_t*>(keys.data_ptr()),
      .values = static_cast<const uint16_t*>(values.data_ptr()),
      .key_stride = keys.stride(0),
      .value_stride = values.stride(0),
      .shadow_keys = levels(shadow_keys),
      .shadow_values = levels(shadow_values),
      .key_scales = scales(key_scales),
      .value_scales = scales(value_scales),
      .valid = elements<uint8_t>(valid, device, kDLUInt, 1, slots, "valid must be uint8 [slots]"),
      .req_to_token = static_cast<const int32_t*>(req_to_token.data_ptr()),
      .row_stride = req_to_token.stride(0),
      .rows = int64s(rows, requests),
      .query_begin = int64s(query_begin, requests + 1),
      .context_lens = int64s(context_lens, requests),
      .tokens = static_cast<int>(tokens),
      .requests = static_cast<int>(requests),
      .kv_heads = static_cast<int>(kv_heads),
      .group = static_cast<int>(heads / kv_heads),
      .exact_newest = static_cast<int>(exact_newest),
      .chunks = chunks,
      .score_factor = static_cast<float>(scale * 1.4426950408889634),
      .norm = rotation_norm(static_cast<int>(dim)),
      .partial_values = workspace(partial_values, dim),
      .partial_sums = reinterpret_cast<float2*>(workspace(partial_sums, 2)),
      .out = out.data_ptr(),
      .out_stride = out.stride(0)};
  const OnDevice on_device(device);
  const cudaStream_t stream = current_stream(device);
  if (dim == 64) return launch<64>(params, out_is_float, device.device_id, stream);
  launch<128>(params, out_is_float, device.device_id, stream);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequant_attention, dequant_attention);

}  // namespace sglang_er::cuda
