// A whole forward of a Llama-like decoder (Llama, Mistral, Qwen2, Qwen3) over SGLang's paged KV pool, in one
// call: embedding, all layers, final norm and, if asked, the lm_head. The weights are those of the live
// modules (exact) or of the twin (packed int4); nothing is copied.
//
// Activations are fp32 from the embedding to the last norm, K and V are rounded to the pool's dtype. A
// token's result depends on its context only, bit for bit: not on the batch, not on how many tokens of the
// request come with it, not on threads. So a verify pass gives the logits that plain decode would have given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "paged_attention_op.h"
#include "sglang_er/packed_weight.h"

namespace sglang_er::cpu {

enum class LinearKind : int { kExact, kW4A16, kW4A8 };

struct LinearWeight {
  LinearKind kind;
  int64_t n;
  int64_t k;
  const void* weight;  // exact: [N, K] of weight_type, rows contiguous
  DType weight_type;
  const uint8_t* packed;         // W4
  const uint16_t* scales_zeros;  // W4
  int group_size;                // W4
  const void* bias;              // [N] or null
  DType bias_type;

  void operator()(const float* x, int64_t tokens, float* out, int threads) const;
};

struct NormWeight {
  const void* weight;  // [size] or null
  DType type;
};

struct DecoderLayer {
  NormWeight input_norm;
  LinearWeight qkv;
  NormWeight q_norm;
  NormWeight k_norm;
  LinearWeight o;
  NormWeight post_norm;
  LinearWeight gate_up;
  LinearWeight down;
  void* keys;  // this layer's KV pool
  void* values;
};

struct DecoderModel {
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t vocab_size;
  int q_heads;
  int kv_heads;
  int head_dim;
  int rotary_dim;
  bool neox;
  float eps;
  float attention_scale;
  int64_t window;         // as in PagedAttentionCall
  const void* embedding;  // [vocab, hidden]
  DType embedding_type;
  const void* cos_sin;  // [positions, rotary_dim]
  DType cos_sin_type;
  int64_t positions;
  DType kv_type;
  int64_t key_stride;  // elements between slots
  int64_t value_stride;
  int64_t slots;
  NormWeight final_norm;
  LinearWeight lm_head;  // n = 0: no logits from this decoder
  std::vector<DecoderLayer> layers;
};

struct DecoderBatch {
  const int64_t* tokens;     // [T]
  const int64_t* positions;  // [T]
  const int64_t* slots;      // [T] KV slots that the tokens write
  int64_t total;             // T
  const int32_t* req_to_token;
  int64_t row_stride;
  const int64_t* rows;          // [requests]
  const int64_t* query_begin;   // [requests + 1]
  const int64_t* context_lens;  // [requests], the new tokens included
  int64_t requests;
  const KvShadowView* shadows;  // [layers] or null
  uint8_t* shadow_valid;        // [slots] or null
  float* hidden_out;            // [T, hidden] after the final norm, or null
  float* logits_out;            // [T, vocab], or null
  int threads;
};

// Working memory of a forward; grows to the largest batch and is kept.
class DecoderBuffers {
 public:
  // Throws std::bad_alloc.
  float* take(size_t floats);
  ~DecoderBuffers();
  DecoderBuffers() = default;
  DecoderBuffers(const DecoderBuffers&) = delete;
  DecoderBuffers& operator=(const DecoderBuffers&) = delete;

 private:
  float* data_ = nullptr;
  size_t floats_ = 0;
};

void decode(const DecoderModel& model, const DecoderBatch& batch, DecoderBuffers& buffers);

}  // namespace sglang_er::cpu
