// make_decoder(config, layers) -> forward(...): a function that owns its model. It keeps every tensor that it
// was given alive, so a parameter that was replaced meanwhile costs memory, never a bad read.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <memory>
#include <string>

#include "binding.h"
#include "decoder.h"

namespace sglang_er::cpu {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;
using tvm::ffi::Tensor;

using Fields = Map<String, Any>;

int64_t integer(const Fields& fields, const char* name) { return fields.at(name).cast<int64_t>(); }

// The tensor called `name`, kept in `kept`; null if there is none.
const Tensor* tensor(const Fields& fields, const std::string& name, std::vector<Tensor>& kept) {
  const auto found = fields.find(String(name));
  if (found == fields.end() || (*found).second == nullptr) return nullptr;
  kept.push_back((*found).second.cast<Tensor>());
  SGLANG_ER_CHECK(kept.back().IsContiguous() || kept.back().ndim() > 2,
                  "decoder: " + name + " must be contiguous");
  return &kept.back();
}

NormWeight norm_weight(const Fields& fields, const std::string& name, int64_t size,
                       std::vector<Tensor>& kept) {
  const Tensor* weight = tensor(fields, name, kept);
  if (weight == nullptr) return {nullptr, DType::kFloat32};
  SGLANG_ER_CHECK(weight->numel() == size, "decoder: " + name + " has the wrong size");
  return {weight->data_ptr(), dtype_of(*weight)};
}

LinearWeight linear_weight(const Fields& config, const Fields& fields, const std::string& name, int64_t n,
                           int64_t k, std::vector<Tensor>& kept) {
  LinearWeight linear{};
  linear.n = n;
  linear.k = k;
  linear.group_size = static_cast<int>(integer(config, "group_size"));
  if (const Tensor* weight = tensor(fields, name + ".weight", kept)) {
    linear.kind = LinearKind::kExact;
    SGLANG_ER_CHECK(weight->ndim() == 2 && weight->size(0) == n && weight->size(1) == k,
                    "decoder: " + name + ".weight has the wrong shape");
    linear.weight = weight->data_ptr();
    linear.weight_type = dtype_of(*weight);
  } else {
    linear.kind = integer(config, "int8_activations") != 0 ? LinearKind::kW4A8 : LinearKind::kW4A16;
    const Tensor* packed = tensor(fields, name + ".packed", kept);
    SGLANG_ER_CHECK(packed != nullptr, "decoder: " + name + " has neither weight nor packed");
    linear.packed = static_cast<const uint8_t*>(packed->data_ptr());
    const Tensor* scales_zeros = tensor(fields, name + ".scales_zeros", kept);
    SGLANG_ER_CHECK(scales_zeros != nullptr, "decoder: " + name + " has no scales_zeros");
    linear.scales_zeros = static_cast<const uint16_t*>(scales_zeros->data_ptr());
    packed_shape(n, k, linear.group_size, kept[kept.size() - 2], kept.back());
  }
  if (const Tensor* bias = tensor(fields, name + ".bias", kept)) {
    SGLANG_ER_CHECK(bias->numel() == n, "decoder: " + name + ".bias has the wrong size");
    linear.bias = bias->data_ptr();
    linear.bias_type = dtype_of(*bias);
  }
  return linear;
}

class BoundDecoder {
 public:
  BoundDecoder(const Fields& config, const Array<Fields>& layers) {
    // Pointers into kept_ are used while it grows.
    kept_.reserve(16 + layers.size() * 24);
    model_.hidden_size = integer(config, "hidden_size");
    model_.intermediate_size = integer(config, "intermediate_size");
    model_.vocab_size = integer(config, "vocab_size");
    model_.q_heads = static_cast<int>(integer(config, "q_heads"));
    model_.kv_heads = static_cast<int>(integer(config, "kv_heads"));
    model_.head_dim = static_cast<int>(integer(config, "head_dim"));
    model_.rotary_dim = static_cast<int>(integer(config, "rotary_dim"));
    model_.neox = integer(config, "neox") != 0;
    model_.window = integer(config, "window");
    model_.eps = static_cast<float>(config.at("eps").cast<double>());
    model_.attention_scale = static_cast<float>(config.at("attention_scale").cast<double>());
    SGLANG_ER_CHECK(
        model_.rotary_dim % 2 == 0 && model_.rotary_dim <= model_.head_dim && model_.rotary_dim <= 512,
        "decoder: rotary_dim must be even, at most head_dim and 512");
    SGLANG_ER_CHECK(model_.kv_heads > 0 && model_.q_heads % model_.kv_heads == 0,
                    "decoder: q_heads must be a multiple of kv_heads");
    const Tensor* embedding = required(config, "embedding");
    SGLANG_ER_CHECK(embedding->ndim() == 2 && embedding->size(0) >= model_.vocab_size &&
                        embedding->size(1) == model_.hidden_size,
                    "decoder: embedding has the wrong shape");
    model_.embedding = embedding->data_ptr();
    model_.embedding_type = dtype_of(*embedding);
    const Tensor* cos_sin = required(config, "cos_sin");
    SGLANG_ER_CHECK(cos_sin->ndim() == 2 && cos_sin->size(1) == model_.rotary_dim,
                    "decoder: cos_sin has the wrong shape");
    model_.cos_sin = cos_sin->data_ptr();
    model_.cos_sin_type = dtype_of(*cos_sin);
    model_.positions = cos_sin->size(0);
    model_.final_norm = norm_weight(config, "final_norm", model_.hidden_size, kept_);
    if (integer(config, "lm_head") != 0) {
      model_.lm_head = linear_weight(config, config, "lm_head", model_.vocab_size, model_.hidden_size, kept_);
    }
    shadow_bits_ = static_cast<int>(integer(config, "shadow_bits"));
    if (const Tensor* valid = tensor(config, "shadow_valid", kept_)) {
      shadow_valid_ = static_cast<uint8_t*>(valid->data_ptr());
      shadow_slots_ = valid->numel();
    }
    SGLANG_ER_CHECK(shadow_bits_ == 0 || shadow_valid_ != nullptr, "decoder: a shadow needs shadow_valid");
    for (const Fields& layer : layers) add_layer(config, layer);
    SGLANG_ER_CHECK(!model_.layers.empty(), "decoder: no layers");
  }

  void forward(TensorView tokens, TensorView positions, TensorView slots, TensorView req_to_token,
               TensorView rows, TensorView query_begin, TensorView context_lens,
               Optional<TensorView> hidden_out, Optional<TensorView> logits_out, int64_t exact_newest,
               int64_t threads) {
    const int64_t total = tokens.numel();
    const int64_t requests = rows.numel();
    check_int64(tokens, total, "tokens");
    check_int64(positions, total, "positions");
    check_int64(slots, total, "slots");
    check_int64(rows, requests, "rows");
    check_int64(query_begin, requests + 1, "query_begin");
    check_int64(context_lens, requests, "context_lens");
    SGLANG_ER_CHECK(req_to_token.ndim() == 2 && req_to_token.stride(1) == 1 &&
                        req_to_token.dtype().code == kDLInt && req_to_token.dtype().bits == 32,
                    "decoder: req_to_token must be an int32 matrix with contiguous rows");
    DecoderBatch batch{};
    batch.tokens = static_cast<const int64_t*>(tokens.data_ptr());
    batch.positions = static_cast<const int64_t*>(positions.data_ptr());
    batch.slots = static_cast<const int64_t*>(slots.data_ptr());
    batch.total = total;
    batch.req_to_token = static_cast<const int32_t*>(req_to_token.data_ptr());
    batch.row_stride = req_to_token.stride(0);
    batch.rows = static_cast<const int64_t*>(rows.data_ptr());
    batch.query_begin = static_cast<const int64_t*>(query_begin.data_ptr());
    batch.context_lens = static_cast<const int64_t*>(context_lens.data_ptr());
    batch.requests = requests;
    batch.hidden_out = output(hidden_out, total, model_.hidden_size, "hidden_out");
    batch.logits_out = output(logits_out, total, model_.vocab_size, "logits_out");
    SGLANG_ER_CHECK(batch.logits_out == nullptr || model_.lm_head.n > 0, "decoder: made without lm_head");
    batch.threads = checked_threads(threads);
    batch.shadow_valid = shadow_valid_;
    if (exact_newest >= 0) {
      SGLANG_ER_CHECK(shadow_bits_ != 0, "decoder: made without a shadow");
      for (KvShadowView& shadow : shadows_) shadow.exact_newest = static_cast<int>(exact_newest);
      batch.shadows = shadows_.data();
    }
    check_ranges(batch, req_to_token.size(0), req_to_token.size(1));
    decode(model_, batch, buffers_);
  }

 private:
  const Tensor* required(const Fields& fields, const char* name) {
    const Tensor* found = tensor(fields, name, kept_);
    SGLANG_ER_CHECK(found != nullptr, std::string("decoder: ") + name + " is missing");
    return found;
  }

  void add_layer(const Fields& config, const Fields& fields) {
    const int64_t heads = int64_t{model_.q_heads} * model_.head_dim;
    const int64_t all_heads = heads + int64_t{2} * model_.kv_heads * model_.head_dim;
    DecoderLayer layer{};
    layer.input_norm = norm_weight(fields, "input_norm", model_.hidden_size, kept_);
    layer.qkv = linear_weight(config, fields, "qkv", all_heads, model_.hidden_size, kept_);
    layer.q_norm = norm_weight(fields, "q_norm", model_.head_dim, kept_);
    layer.k_norm = norm_weight(fields, "k_norm", model_.head_dim, kept_);
    layer.o = linear_weight(config, fields, "o", model_.hidden_size, heads, kept_);
    layer.post_norm = norm_weight(fields, "post_norm", model_.hidden_size, kept_);
    layer.gate_up =
        linear_weight(config, fields, "gate_up", 2 * model_.intermediate_size, model_.hidden_size, kept_);
    layer.down = linear_weight(config, fields, "down", model_.hidden_size, model_.intermediate_size, kept_);
    SGLANG_ER_CHECK(layer.input_norm.weight != nullptr && layer.post_norm.weight != nullptr,
                    "decoder: a layer has no norm");
    SGLANG_ER_CHECK((layer.q_norm.weight == nullptr) == (layer.k_norm.weight == nullptr) &&
                        layer.q_norm.type == layer.k_norm.type,
                    "decoder: q_norm and k_norm must come together");
    const Tensor* keys = pool(fields, "keys");
    const Tensor* values = pool(fields, "values");
    SGLANG_ER_CHECK(dtype_of(*keys) == dtype_of(*values) && keys->size(0) == values->size(0),
                    "decoder: keys and values differ in dtype or slots");
    if (model_.layers.empty()) {
      model_.kv_type = dtype_of(*keys);
      model_.slots = keys->size(0);
      model_.key_stride = keys->stride(0);
      model_.value_stride = values->stride(0);
    }
    SGLANG_ER_CHECK(dtype_of(*keys) == model_.kv_type && keys->size(0) == model_.slots &&
                        keys->stride(0) == model_.key_stride && values->stride(0) == model_.value_stride,
                    "decoder: the KV pools of the layers differ");
    SGLANG_ER_CHECK(shadow_valid_ == nullptr || shadow_slots_ == model_.slots,
                    "decoder: shadow_valid does not have one flag per slot");
    layer.keys = keys->data_ptr();
    layer.values = values->data_ptr();
    model_.layers.push_back(layer);
    if (shadow_bits_ != 0) shadows_.push_back(shadow_view(fields));
  }

  KvShadowView shadow_view(const Fields& fields) {
    const int64_t values = model_.slots * model_.kv_heads;
    const auto part = [&](const char* name, int64_t bytes) {
      const Tensor* found = required(fields, name);
      SGLANG_ER_CHECK(found->IsContiguous() && found->numel() * found->dtype().bits / 8 == bytes,
                      std::string("decoder: ") + name + " does not fit the KV pool");
      return found->data_ptr();
    };
    const int64_t levels = values * model_.head_dim * shadow_bits_ / 8;
    KvShadowView view{};
    view.bits = shadow_bits_;
    view.keys = part("shadow.keys", levels);
    view.values = part("shadow.values", levels);
    view.key_scales = static_cast<const uint16_t*>(part("shadow.key_scales", values * 2));
    view.value_scales = static_cast<const uint16_t*>(part("shadow.value_scales", values * 2));
    view.valid = shadow_valid_;
    return view;
  }

  const Tensor* pool(const Fields& fields, const char* name) {
    const Tensor* found = required(fields, name);
    SGLANG_ER_CHECK(
        found->ndim() == 3 && found->size(1) == model_.kv_heads && found->size(2) == model_.head_dim &&
            found->stride(2) == 1 && found->stride(1) == model_.head_dim,
        std::string("decoder: ") + name + " must be [slots, kv_heads, head_dim] with contiguous heads");
    return found;
  }

  static void check_int64(const TensorView& view, int64_t size, const char* name) {
    SGLANG_ER_CHECK(
        view.ndim() == 1 && view.numel() == size && view.IsContiguous() && view.dtype().code == kDLInt &&
            view.dtype().bits == 64,
        std::string("decoder: ") + name + " must be a contiguous int64 vector of " + std::to_string(size));
  }

  static float* output(const Optional<TensorView>& view, int64_t rows, int64_t cols, const char* name) {
    if (!view.has_value()) return nullptr;
    const TensorView& out = view.value();
    SGLANG_ER_CHECK(out.ndim() == 2 && out.size(0) == rows && out.size(1) == cols && out.IsContiguous() &&
                        dtype_of(out) == DType::kFloat32,
                    std::string("decoder: ") + name + " must be contiguous float32 of the right shape");
    return static_cast<float*>(out.data_ptr());
  }

  void check_ranges(const DecoderBatch& batch, int64_t table_rows, int64_t table_columns) const {
    for (int64_t t = 0; t < batch.total; ++t) {
      SGLANG_ER_CHECK(batch.tokens[t] >= 0 && batch.tokens[t] < model_.vocab_size,
                      "decoder: a token id is out of range");
      SGLANG_ER_CHECK(batch.positions[t] >= 0 && batch.positions[t] < model_.positions,
                      "decoder: a position is past the rotary table");
      SGLANG_ER_CHECK(batch.slots[t] >= 0 && batch.slots[t] < model_.slots,
                      "decoder: a slot is outside the KV pool");
    }
    SGLANG_ER_CHECK(batch.query_begin[0] == 0 && batch.query_begin[batch.requests] == batch.total,
                    "decoder: query_begin must go from 0 to the number of tokens");
    for (int64_t b = 0; b < batch.requests; ++b) {
      const int64_t queries = batch.query_begin[b + 1] - batch.query_begin[b];
      SGLANG_ER_CHECK(queries >= 0 && queries <= batch.context_lens[b],
                      "decoder: a context is shorter than its queries");
      SGLANG_ER_CHECK(
          batch.rows[b] >= 0 && batch.rows[b] < table_rows && batch.context_lens[b] <= table_columns,
          "decoder: a request is outside req_to_token");
      const int32_t* row = batch.req_to_token + batch.rows[b] * batch.row_stride;
      for (int64_t p = 0; p < batch.context_lens[b]; ++p) {
        SGLANG_ER_CHECK(row[p] >= 0 && row[p] < model_.slots, "decoder: a slot is outside the KV pool");
      }
    }
  }

  DecoderModel model_{};
  DecoderBuffers buffers_;
  std::vector<Tensor> kept_;
  int shadow_bits_ = 0;
  uint8_t* shadow_valid_ = nullptr;
  int64_t shadow_slots_ = 0;
  std::vector<KvShadowView> shadows_;
};

Function make_decoder_ffi(Fields config, Array<Fields> layers) {
  auto decoder = std::make_shared<BoundDecoder>(config, layers);
  return Function::FromTyped([decoder](TensorView tokens, TensorView positions, TensorView slots,
                                       TensorView req_to_token, TensorView rows, TensorView query_begin,
                                       TensorView context_lens, Optional<TensorView> hidden_out,
                                       Optional<TensorView> logits_out, int64_t exact_newest,
                                       int64_t threads) {
    decoder->forward(tokens, positions, slots, req_to_token, rows, query_begin, context_lens, hidden_out,
                     logits_out, exact_newest, threads);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_decoder, make_decoder_ffi);

}  // namespace sglang_er::cpu
