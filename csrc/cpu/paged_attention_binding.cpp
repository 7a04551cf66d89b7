// paged_attention for Python. The slot table is data that a caller may have wrong, so the part of it that
// will be used is checked here: nothing outside the pool is ever read.
#include <tvm/ffi/function.h>

#include <algorithm>

#include "binding.h"
#include "kv_shadow_op.h"
#include "paged_attention_op.h"
#include "sglang_er/kv_shadow.h"

namespace sglang_er::cpu {
namespace {

// [any, heads, dim] with each [heads, dim] contiguous.
void check_heads(const TensorView& tensor, const char* message) {
  SGLANG_ER_CHECK(tensor.device().device_type == kDLCPU, "tensors must be on the CPU");
  SGLANG_ER_CHECK(tensor.ndim() == 3, message);
  const bool inner = (tensor.size(2) <= 1 || tensor.stride(2) == 1) &&
                     (tensor.size(1) <= 1 || tensor.stride(1) == tensor.size(2));
  SGLANG_ER_CHECK(inner, message);
}

struct Pool {
  int64_t slots;
  int kv_heads, head_dim, value_dim;
};

Pool checked_pool(const TensorView& keys, const TensorView& values) {
  check_heads(keys, "keys must be [slots, kv_heads, head_dim] with contiguous slots");
  check_heads(values, "values must be [slots, kv_heads, value_dim] with contiguous slots");
  SGLANG_ER_CHECK(values.size(0) == keys.size(0) && values.size(1) == keys.size(1) && keys.size(1) > 0 &&
                      dtype_of(values) == dtype_of(keys),
                  "values must have the slots, heads and dtype of keys");
  const auto good = [](int64_t size) { return size > 0 && size <= 256 && size % 8 == 0; };
  SGLANG_ER_CHECK(good(keys.size(2)) && good(values.size(2)),
                  "head_dim and value_dim must be multiples of 8, at most 256");
  return {keys.size(0), static_cast<int>(keys.size(1)), static_cast<int>(keys.size(2)),
          static_cast<int>(values.size(2))};
}

void check_shadow(const Pool& pool, int64_t bits, const TensorView& keys, const TensorView& values,
                  const TensorView& key_scales, const TensorView& value_scales) {
  const bool known = bits == 8 || (bits == 4 && pool.head_dim % kInt4DimMultiple == 0 &&
                                   pool.value_dim % kInt4DimMultiple == 0);
  SGLANG_ER_CHECK(known, "bits must be 8, or 4 with head_dim and value_dim multiples of 32");
  const auto fits = [&](const TensorView& tensor, int dim) {
    return tensor.device().device_type == kDLCPU && tensor.IsContiguous() && tensor.dtype().bits == 8 &&
           tensor.numel() == pool.slots * pool.kv_heads * (dim * bits / 8);
  };
  SGLANG_ER_CHECK(fits(keys, pool.head_dim) && fits(values, pool.value_dim),
                  "the shadow's keys and values do not fit the pool");
  for (const TensorView& scales : {key_scales, value_scales}) {
    const bool good = scales.device().device_type == kDLCPU && scales.IsContiguous() &&
                      dtype_of(scales) == DType::kBFloat16 && scales.numel() == pool.slots * pool.kv_heads;
    SGLANG_ER_CHECK(good, "the shadow's scales do not fit the pool");
  }
}

const int64_t* int64_values(const TensorView& tensor, int64_t count, const char* message) {
  const DLDataType dtype = tensor.dtype();
  const bool fits = tensor.device().device_type == kDLCPU && tensor.ndim() == 1 && tensor.size(0) == count &&
                    dtype.code == kDLInt && dtype.bits == 64 && dtype.lanes == 1 && tensor.IsContiguous();
  SGLANG_ER_CHECK(fits, message);
  return static_cast<const int64_t*>(tensor.data_ptr());
}

void check_requests(const PagedAttentionCall& call, int64_t tokens, int64_t table_rows, int64_t table_columns,
                    int64_t slots) {
  SGLANG_ER_CHECK(call.query_begin[0] == 0 && call.query_begin[call.requests] == tokens,
                  "query_begin must rise from 0 to the number of query tokens");
  for (int64_t request = 0; request < call.requests; ++request) {
    const int64_t queries = call.query_begin[request + 1] - call.query_begin[request];
    const int64_t context = call.context_lens[request];
    SGLANG_ER_CHECK(queries >= 0, "query_begin must rise from 0 to the number of query tokens");
    if (queries == 0) continue;
    if (context < queries || context > table_columns) {
      TVM_FFI_THROW(ValueError) << "request " << request << " has context_len " << context << ", expected "
                                << queries << " (its query tokens) to " << table_columns
                                << " (columns of req_to_token)";
    }
    const int64_t row = call.rows[request];
    if (row < 0 || row >= table_rows) {
      TVM_FFI_THROW(ValueError) << "request " << request << " has row " << row << ", req_to_token has "
                                << table_rows << " rows";
    }
    const int32_t* table = call.req_to_token + row * call.row_stride;
    const int64_t first_query = context - queries;
    const int64_t begin = call.window < 0 ? 0 : std::max<int64_t>(first_query - call.window, 0);
    uint32_t largest = 0;  // a negative slot is a huge unsigned one
    for (int64_t position = begin; position < context; ++position)
      largest = std::max(largest, static_cast<uint32_t>(table[position]));
    if (largest >= slots) {
      TVM_FFI_THROW(ValueError) << "request " << request << " uses slot " << static_cast<int32_t>(largest)
                                << ", the pool has " << slots;
    }
  }
}

void paged_attention_ffi(TensorView q, TensorView keys, TensorView values, TensorView req_to_token,
                         TensorView rows, TensorView query_begin, TensorView context_lens, double scale,
                         int64_t window, int64_t bits, Optional<TensorView> shadow_keys,
                         Optional<TensorView> shadow_values, Optional<TensorView> key_scales,
                         Optional<TensorView> value_scales, Optional<TensorView> valid, int64_t exact_newest,
                         TensorView out, int64_t threads) {
  const Pool pool = checked_pool(keys, values);
  check_heads(q, "q must be [tokens, heads, head_dim] with contiguous tokens");
  check_heads(out, "out must be [tokens, heads, value_dim] with contiguous tokens");
  SGLANG_ER_CHECK(q.size(2) == pool.head_dim && q.size(1) % pool.kv_heads == 0,
                  "q must have the head_dim of keys and a multiple of their heads");
  SGLANG_ER_CHECK(out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == pool.value_dim,
                  "out must have the tokens and heads of q and the value_dim of values");
  const DLDataType table = req_to_token.dtype();
  SGLANG_ER_CHECK(table.code == kDLInt && table.bits == 32 && table.lanes == 1, "req_to_token must be int32");
  check_matrix(req_to_token, "req_to_token must be a matrix with contiguous rows");

  const int64_t requests = rows.size(0);
  PagedAttentionCall call{};
  call.q = q.data_ptr();
  call.q_stride = q.stride(0);
  call.q_type = dtype_of(q);
  call.keys = keys.data_ptr();
  call.values = values.data_ptr();
  call.key_stride = keys.stride(0);
  call.value_stride = values.stride(0);
  call.kv_type = dtype_of(keys);
  call.q_heads = static_cast<int>(q.size(1));
  call.kv_heads = pool.kv_heads;
  call.head_dim = pool.head_dim;
  call.value_dim = pool.value_dim;
  call.req_to_token = static_cast<const int32_t*>(req_to_token.data_ptr());
  call.row_stride = req_to_token.stride(0);
  call.rows = int64_values(rows, requests, "rows must be a contiguous int64 vector");
  call.query_begin = int64_values(query_begin, requests + 1, "query_begin must be int64 [requests + 1]");
  call.context_lens = int64_values(context_lens, requests, "context_lens must be int64 [requests]");
  call.requests = requests;
  call.scale = static_cast<float>(scale);
  call.window = window;
  call.out = out.data_ptr();
  call.out_stride = out.stride(0);
  call.out_type = dtype_of(out);
  call.threads = checked_threads(threads);
  if (bits != 0) {
    check_shadow(pool, bits, shadow_keys.value(), shadow_values.value(), key_scales.value(),
                 value_scales.value());
    const TensorView flags = valid.value();
    SGLANG_ER_CHECK(flags.device().device_type == kDLCPU && flags.IsContiguous() && flags.dtype().bits == 8 &&
                        flags.numel() == pool.slots && exact_newest >= 0 && exact_newest <= INT32_MAX,
                    "valid must be uint8 [slots] and exact_newest not negative");
    call.shadow = {.bits = static_cast<int>(bits),
                   .keys = shadow_keys.value().data_ptr(),
                   .values = shadow_values.value().data_ptr(),
                   .key_scales = static_cast<const uint16_t*>(key_scales.value().data_ptr()),
                   .value_scales = static_cast<const uint16_t*>(value_scales.value().data_ptr()),
                   .valid = static_cast<const uint8_t*>(flags.data_ptr()),
                   .exact_newest = static_cast<int>(exact_newest)};
  }
  check_requests(call, q.size(0), req_to_token.size(0), req_to_token.size(1), pool.slots);
  paged_attention(call);
}

void kv_shadow_store_ffi(TensorView keys, TensorView values, TensorView slots, int64_t bits,
                         TensorView shadow_keys, TensorView shadow_values, TensorView key_scales,
                         TensorView value_scales, int64_t threads) {
  const Pool pool = checked_pool(keys, values);
  check_shadow(pool, bits, shadow_keys, shadow_values, key_scales, value_scales);
  const int64_t* wanted = int64_values(slots, slots.numel(), "slots must be a contiguous int64 vector");
  for (int64_t i = 0; i < slots.numel(); ++i) {
    if (wanted[i] < 0 || wanted[i] >= pool.slots)
      TVM_FFI_THROW(ValueError) << "slot " << wanted[i] << " is outside the pool of " << pool.slots;
  }
  kv_shadow_store({.keys = keys.data_ptr(),
                   .values = values.data_ptr(),
                   .key_stride = keys.stride(0),
                   .value_stride = values.stride(0),
                   .kv_type = dtype_of(keys),
                   .kv_heads = pool.kv_heads,
                   .head_dim = pool.head_dim,
                   .value_dim = pool.value_dim,
                   .slots = wanted,
                   .count = slots.numel(),
                   .bits = static_cast<int>(bits),
                   .shadow_keys = shadow_keys.data_ptr(),
                   .shadow_values = shadow_values.data_ptr(),
                   .key_scales = static_cast<uint16_t*>(key_scales.data_ptr()),
                   .value_scales = static_cast<uint16_t*>(value_scales.data_ptr()),
                   .threads = checked_threads(threads)});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention, paged_attention_ffi);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_shadow_store, kv_shadow_store_ffi);

}  // namespace sglang_er::cpu
