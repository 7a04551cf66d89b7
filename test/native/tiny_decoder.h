// A decoder of two layers with odd sizes, in exact buffers.
#pragma once

#include <list>

#include "decoder.h"
#include "isa.h"
#include "packed.h"
#include "testing.h"

namespace sglang_er::cpu {

inline constexpr int kHeads = 4, kKvHeads = 2, kDim = 24, kRotary = 16, kLayers = 2, kGroup = 32;
inline constexpr int64_t kHidden = 37, kInner = 53, kVocabulary = 29, kSlots = 23, kTokens = 11;
inline constexpr int64_t kAll = (kHeads + 2 * kKvHeads) * kDim;
// Two requests, all of their contexts in the batch.
inline constexpr int64_t kLengths[] = {7, 4};

// A weight in every form, and its value as the kernels see it.
struct Linear {
  Matrix exact, bias;
  Packed packed;
  LinearKind kind;

  Linear(Random& random, LinearKind kind, int64_t n, int64_t k)
      : exact(Matrix::random(random, DType::kBFloat16, n, k)),
        bias(Matrix::random(random, DType::kFloat32, 1, n)),
        packed(pack(exact, kGroup, 1)),
        kind(kind) {}
  LinearWeight view() const {
    if (kind == LinearKind::kExact) {
      return {.kind = kind,
              .n = exact.rows,
              .k = exact.cols,
              .weight = exact.data(),
              .weight_type = exact.type,
              .packed = nullptr,
              .scales_zeros = nullptr,
              .group_size = 0,
              .bias = bias.data(),
              .bias_type = bias.type};
    }
    return {.kind = kind,
            .n = exact.rows,
            .k = exact.cols,
            .weight = nullptr,
            .weight_type = exact.type,
            .packed = packed.packed.data(),
            .scales_zeros = packed.scales_zeros.data(),
            .group_size = kGroup,
            .bias = bias.data(),
            .bias_type = bias.type};
  }
  // Dot products of bf16 pairs round what enters an exact linear.
  bool rounds_x() const { return multiplies_bf16(active_isa()) && kind == LinearKind::kExact; }
  std::vector<double> operator()(std::vector<double> x) const {
    if (rounds_x()) {
      for (double& value : x) value = bf16_to_float(float_to_bf16(static_cast<float>(value)));
    }
    std::vector<double> out;
    for (int64_t n = 0; n < exact.rows; ++n) {
      double sum = bias.at(0, n);
      for (int64_t k = 0; k < exact.cols; ++k)
        sum += x[k] * (kind == LinearKind::kExact ? exact.at(n, k) : packed.value(n, k));
      out.push_back(sum);
    }
    return out;
  }
};

inline std::vector<double> normed(std::vector<double> x, const Matrix& weight) {
  double squares = 0.0;
  for (double value : x) squares += value * value;
  const double factor = 1.0 / std::sqrt(squares / static_cast<double>(x.size()) + 1e-6);
  for (size_t i = 0; i < x.size(); ++i) x[i] *= factor * weight.at(0, static_cast<int64_t>(i));
  return x;
}

struct Layer {
  Matrix input_norm, q_norm, k_norm, post_norm;
  Linear qkv, o, gate_up, down;
  Matrix keys, values;

  Layer(Random& random, LinearKind kind, DType kv_type)
      : input_norm(Matrix::random(random, DType::kBFloat16, 1, kHidden)),
        q_norm(Matrix::random(random, DType::kBFloat16, 1, kDim)),
        k_norm(Matrix::random(random, DType::kBFloat16, 1, kDim)),
        post_norm(Matrix::random(random, DType::kBFloat16, 1, kHidden)),
        qkv(random, kind, kAll, kHidden),
        o(random, kind, kHidden, kHeads * kDim),
        gate_up(random, kind, 2 * kInner, kHidden),
        down(random, kind, kHidden, kInner),
        keys(kv_type, kSlots, kKvHeads * kDim, 8),
        values(kv_type, kSlots, kKvHeads * kDim, 16) {}
  DecoderLayer view() const {
    const auto norm = [](const Matrix& weight) { return NormWeight{weight.data(), weight.type}; };
    return {norm(input_norm), qkv.view(),     norm(q_norm), norm(k_norm), o.view(),
            norm(post_norm),  gate_up.view(), down.view(),  keys.data(),  values.data()};
  }
};

struct Model {
  std::list<Layer> layers;
  Matrix embedding, table, final_norm;
  Linear lm_head;
  DecoderModel view;

  Model(Random& random, LinearKind kind, DType kv_type)
      : embedding(Matrix::random(random, DType::kBFloat16, kVocabulary, kHidden)),
        table(Matrix::random(random, DType::kFloat32, 9, kRotary)),
        final_norm(Matrix::random(random, DType::kFloat32, 1, kHidden)),
        lm_head(random, kind, kVocabulary, kHidden) {
    for (int i = 0; i < kLayers; ++i) layers.emplace_back(random, kind, kv_type);
    view = {.hidden_size = kHidden,
            .intermediate_size = kInner,
            .vocab_size = kVocabulary,
            .q_heads = kHeads,
            .kv_heads = kKvHeads,
            .head_dim = kDim,
            .rotary_dim = kRotary,
            .neox = true,
            .eps = 1e-6f,
            .attention_scale = 0.2f,
            .window = -1,
            .embedding = embedding.data(),
            .embedding_type = embedding.type,
            .cos_sin = table.data(),
            .cos_sin_type = table.type,
            .positions = table.rows,
            .kv_type = kv_type,
            .key_stride = layers.front().keys.stride,
            .value_stride = layers.front().values.stride,
            .slots = kSlots,
            .final_norm = {final_norm.data(), final_norm.type},
            .lm_head = lm_head.view(),
            .layers = {}};
    for (const Layer& layer : layers) view.layers.push_back(layer.view());
  }
};

}  // namespace sglang_er::cpu
