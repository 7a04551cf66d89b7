// The call of paged_attention, as the bindings and the decoder hand it to the kernel of the active
// instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace sglang_er::cpu {

// Quantized copy of one layer's KV pool, read in place of it where it is valid (kv_shadow.h has the layout).
struct KvShadowView {
  int bits;  // 8, 4; 0 = no shadow
  const void* keys;
  const void* values;
  const uint16_t* key_scales;    // bf16 [slots, kv_heads]
  const uint16_t* value_scales;  // bf16 [slots, kv_heads]
  const uint8_t* valid;          // [slots], shared by all layers: 1 = this slot may be read from the shadow
  int exact_newest;              // that many newest tokens of a context are read from the pool
};

// Tokens of request b are rows query_begin[b] .. query_begin[b + 1] of q; they are the last ones of a context
// of context_lens[b] tokens whose KV is already in the pool. Position p of request b lies in slot
// req_to_token[rows[b] * row_stride + p]. Token i of n sees positions (first, context_lens[b] - n + i], where
// first = -1, or its own position - window - 1 if window >= 0.
struct PagedAttentionCall {
  const void* q;  // [tokens, q_heads, head_dim], q_type, tokens q_stride elements apart
  int64_t q_stride;
  DType q_type;
  const void* keys;    // [slots, kv_heads, head_dim], kv_type, slots key_stride elements apart
  const void* values;  // [slots, kv_heads, value_dim], kv_type, slots value_stride elements apart
  int64_t key_stride;
  int64_t value_stride;
  DType kv_type;
  int q_heads;
  int kv_heads;
  int head_dim;
  int value_dim;
  const int32_t* req_to_token;
  int64_t row_stride;
  const int64_t* rows;          // [requests]
  const int64_t* query_begin;   // [requests + 1]
  const int64_t* context_lens;  // [requests]
  int64_t requests;
  float scale;
  int64_t window;  // tokens before the query's own that it may see; -1 = all
  KvShadowView shadow;
  void* out;  // [tokens, q_heads, value_dim], out_type, tokens out_stride elements apart
  int64_t out_stride;
  DType out_type;
  int threads;
};

void paged_attention(const PagedAttentionCall& call);  // the active instruction set

void paged_attention_portable(const PagedAttentionCall& call);
void paged_attention_avx2(const PagedAttentionCall& call);
void paged_attention_avx512(const PagedAttentionCall& call);

}  // namespace sglang_er::cpu
