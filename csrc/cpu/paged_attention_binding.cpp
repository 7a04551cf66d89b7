// paged_attention for Python. The slot table is data that a caller may have wrong, so the part of it that
// will be used is checked here: nothing outside the pool is ever read.
#include <tvm/ffi/function.h>

#include <algorithm>

#include "binding.h"
#include "paged_attention_op.h"

namespace sglang_er::cpu {
namespace {

void check_heads(const TensorView& tensor, const char* message) {
  SGLANG_ER_CHECK(tensor.device().device_type == kDLCPU, "tensors must be on the CPU");
  SGLANG_ER_CHECK(tensor.ndim() == 3, message);
  const bool inner = (tensor.size(2) <= 1 || tensor.stride(2) == 1) &&
                     (tensor.size(1) <= 1 || tensor.stride(1) == tensor.size(2));
  SGLANG_ER_CHECK(inner, message);
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
                         int64_t window, TensorView out, int64_t threads) {
  check_heads(q, "q must be [tokens, heads, head_dim] with contiguous tokens");
  check_heads(keys, "keys must be [slots, kv_heads, head_dim] with contiguous slots");
  check_heads(values, "values must be [slots, kv_heads, value_dim] with contiguous slots");
  check_heads(out, "out must be [tokens, heads, value_dim] with contiguous tokens");
  const int64_t slots = keys.size(0), kv_heads = keys.size(1), dim = keys.size(2), value_dim = values.size(2);
  SGLANG_ER_CHECK(values.size(0) == slots && values.size(1) == kv_heads && dtype_of(values) == dtype_of(keys),
                  "values must have the slots, heads and dtype of keys");
  SGLANG_ER_CHECK(q.size(2) == dim && kv_heads > 0 && q.size(1) % kv_heads == 0,
                  "q must have the head_dim of keys and a multiple of their heads");
  SGLANG_ER_CHECK(out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == value_dim,
                  "out must have the tokens and heads of q and the value_dim of values");
  const auto good = [](int64_t size) { return size > 0 && size <= 256 && size % 8 == 0; };
  SGLANG_ER_CHECK(good(dim) && good(value_dim), "head_dim and value_dim must be multiples of 8, at most 256");
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
  call.kv_heads = static_cast<int>(kv_heads);
  call.head_dim = static_cast<int>(dim);
  call.value_dim = static_cast<int>(value_dim);
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
  check_requests(call, q.size(0), req_to_token.size(0), req_to_token.size(1), slots);
  paged_attention(call);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention, paged_attention_ffi);

}  // namespace sglang_er::cpu
