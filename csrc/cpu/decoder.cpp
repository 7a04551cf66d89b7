#include "decoder.h"

#include <cstdlib>
#include <new>

#include "bf16_linear_op.h"
#include "isa.h"
#include "layer_ops_op.h"
#include "parallel.h"
#include "w4a16_linear_op.h"
#include "w4a8_linear_op.h"

namespace sglang_er::cpu {
namespace {

constexpr size_t kAlignFloats = 16;  // 64 bytes

size_t aligned(int64_t floats) {
  return (static_cast<size_t>(floats) + kAlignFloats - 1) / kAlignFloats * kAlignFloats;
}

// Activations of one forward, carved out of one buffer.
struct Activations {
  float* hidden;    // [T, H], the residual stream
  float* normed;    // [T, H]
  float* delta;     // [T, H], what a sublayer adds
  float* qkv;       // [T, (q_heads + 2 kv_heads) * head_dim]
  float* attended;  // [T, q_heads * head_dim]
  float* gate_up;   // [T, 2 I]
  float* gated;     // [T, I]

  Activations(const DecoderModel& model, int64_t tokens, DecoderBuffers& buffers) {
    const int64_t head_dim = model.head_dim;
    const size_t h = aligned(tokens * model.hidden_size);
    const size_t q = aligned(tokens * model.q_heads * head_dim);
    const size_t all_heads = aligned(tokens * (model.q_heads + 2 * model.kv_heads) * head_dim);
    const size_t i = aligned(tokens * model.intermediate_size);
    const size_t two_i = aligned(tokens * 2 * model.intermediate_size);
    float* next = buffers.take(3 * h + all_heads + q + two_i + i);
    const auto carve = [&next](size_t floats) {
      float* begin = next;
      next += floats;
      return begin;
    };
    hidden = carve(h);
    normed = carve(h);
    delta = carve(h);
    qkv = carve(all_heads);
    attended = carve(q);
    gate_up = carve(two_i);
    gated = carve(i);
  }
};

void embed(const DecoderModel& model, const DecoderBatch& batch, float* hidden) {
  with_type(model.embedding_type, [&](auto* type) {
    const auto* table = static_cast<decltype(type)>(const_cast<void*>(model.embedding));
    for (int64_t t = 0; t < batch.total; ++t) {
      const auto* row = table + batch.tokens[t] * model.hidden_size;
      for (int64_t i = 0; i < model.hidden_size; ++i) hidden[t * model.hidden_size + i] = to_float(row[i]);
    }
  });
}

void attend(const DecoderModel& model, const DecoderLayer& layer, const DecoderBatch& batch,
            const KvShadowView& shadow, const Activations& act) {
  const int64_t all_heads = int64_t{model.q_heads + 2 * model.kv_heads} * model.head_dim;
  paged_attention({.q = act.qkv,
                   .q_stride = all_heads,
                   .q_type = DType::kFloat32,
                   .keys = layer.keys,
                   .values = layer.values,
                   .key_stride = model.key_stride,
                   .value_stride = model.value_stride,
                   .kv_type = model.kv_type,
                   .q_heads = model.q_heads,
                   .kv_heads = model.kv_heads,
                   .head_dim = model.head_dim,
                   .value_dim = model.head_dim,
                   .req_to_token = batch.req_to_token,
                   .row_stride = batch.row_stride,
                   .rows = batch.rows,
                   .query_begin = batch.query_begin,
                   .context_lens = batch.context_lens,
                   .requests = batch.requests,
                   .scale = model.attention_scale,
                   .window = model.window,
                   .shadow = shadow,
                   .out = act.attended,
                   .out_stride = int64_t{model.q_heads} * model.head_dim,
                   .out_type = DType::kFloat32,
                   .threads = batch.threads});
}

void rotate_and_store(const DecoderModel& model, const DecoderLayer& layer, const DecoderBatch& batch,
                      float* qkv) {
  layer_ops().rotate_and_store({.qkv = qkv,
                                .tokens = batch.total,
                                .q_heads = model.q_heads,
                                .kv_heads = model.kv_heads,
                                .head_dim = model.head_dim,
                                .rotary_dim = model.rotary_dim,
                                .neox = model.neox,
                                .cos_sin = model.cos_sin,
                                .cos_sin_type = model.cos_sin_type,
                                .q_norm = layer.q_norm.weight,
                                .k_norm = layer.k_norm.weight,
                                .norm_type = layer.q_norm.type,
                                .eps = model.eps,
                                .positions = batch.positions,
                                .slots = batch.slots,
                                .keys = layer.keys,
                                .values = layer.values,
                                .key_stride = model.key_stride,
                                .value_stride = model.value_stride,
                                .kv_type = model.kv_type,
                                .shadow_valid = batch.shadow_valid,
                                .threads = batch.threads});
}

void add_norm(const DecoderModel& model, const DecoderBatch& batch, const NormWeight& norm,
              const float* delta, float* hidden, float* out) {
  layer_ops().add_rms_norm({.hidden = hidden,
                            .delta = delta,
                            .weight = norm.weight,
                            .weight_type = norm.type,
                            .eps = model.eps,
                            .out = out,
                            .tokens = batch.total,
                            .size = model.hidden_size,
                            .threads = batch.threads});
}

}  // namespace

void LinearWeight::operator()(const float* x, int64_t tokens, float* out, int threads) const {
  if (kind == LinearKind::kExact) {
    bf16_linear({.x = x,
                 .x_stride = k,
                 .x_type = DType::kFloat32,
                 .m = tokens,
                 .weight = weight,
                 .weight_stride = k,
                 .weight_type = weight_type,
                 .n = n,
                 .k = k,
                 .bias = bias,
                 .bias_type = bias_type,
                 .out = out,
                 .out_stride = n,
                 .out_type = DType::kFloat32,
                 .threads = threads});
    return;
  }
  const W4LinearCall call{.x = x,
                          .x_stride = k,
                          .x_type = DType::kFloat32,
                          .m = tokens,
                          .packed = packed,
                          .scales_zeros = scales_zeros,
                          .shape = {n, k, group_size},
                          .bias = bias,
                          .bias_type = bias_type,
                          .out = out,
                          .out_stride = n,
                          .out_type = DType::kFloat32,
                          .threads = threads};
  kind == LinearKind::kW4A8 ? w4a8_linear(call) : w4a16_linear(call);
}

float* DecoderBuffers::take(size_t floats) {
  if (floats_ < floats) {
    std::free(data_);
    data_ = nullptr;
    floats_ = 0;
    data_ = static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float)));
    if (data_ == nullptr) throw std::bad_alloc();
    floats_ = floats;
  }
  return data_;
}

DecoderBuffers::~DecoderBuffers() { std::free(data_); }

void decode(const DecoderModel& model, const DecoderBatch& batch, DecoderBuffers& buffers) {
  if (batch.total == 0) return;
  const Activations act(model, batch.total, buffers);
  embed(model, batch, act.hidden);
  const float* delta = nullptr;
  for (size_t index = 0; index < model.layers.size(); ++index) {
    const DecoderLayer& layer = model.layers[index];
    add_norm(model, batch, layer.input_norm, delta, act.hidden, act.normed);
    delta = act.delta;
    layer.qkv(act.normed, batch.total, act.qkv, batch.threads);
    rotate_and_store(model, layer, batch, act.qkv);
    attend(model, layer, batch, batch.shadows == nullptr ? KvShadowView{} : batch.shadows[index], act);
    layer.o(act.attended, batch.total, act.delta, batch.threads);
    add_norm(model, batch, layer.post_norm, delta, act.hidden, act.normed);
    layer.gate_up(act.normed, batch.total, act.gate_up, batch.threads);
    layer_ops().silu_and_mul({.gate_up = act.gate_up,
                              .out = act.gated,
                              .tokens = batch.total,
                              .size = model.intermediate_size,
                              .threads = batch.threads});
    layer.down(act.gated, batch.total, act.delta, batch.threads);
  }
  float* normed = batch.hidden_out == nullptr ? act.normed : batch.hidden_out;
  add_norm(model, batch, model.final_norm, delta, act.hidden, normed);
  if (batch.logits_out != nullptr) model.lm_head(normed, batch.total, batch.logits_out, batch.threads);
}

const LayerOps& layer_ops() {
  switch (active_isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
    case Isa::kAvx512:
      return kLayerOpsAvx512;
    case Isa::kAvx2:
      return kLayerOpsAvx2;
    case Isa::kPortable:
      return kLayerOpsPortable;
  }
  return kLayerOpsPortable;
}

}  // namespace sglang_er::cpu
