// A decoder of two layers against plain loops in double, and its promise: a token's result depends on its
// context only, bit for bit.
#include <algorithm>

#include "tiny_decoder.h"

namespace sglang_er::cpu {
namespace {

// The tokens of both requests from position `first` to `last` of each, as far as they are that long.
Matrix run(const Model& model, DecoderBuffers& buffers, int64_t first, int64_t last, int threads) {
  std::vector<int64_t> tokens, positions, slots, begin{0}, lens;
  const Exact<int32_t> table(2 * kLengths[0], -1);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t p = 0; p < kLengths[b]; ++p)
      table[b * kLengths[0] + p] = static_cast<int32_t>(22 - 2 * p - b);
    for (int64_t p = first; p < std::min(last, kLengths[b]); ++p) {
      tokens.push_back((p * 5 + b * 3) % kVocabulary);
      positions.push_back(p);
      slots.push_back(table[b * kLengths[0] + p]);
    }
    begin.push_back(static_cast<int64_t>(tokens.size()));
    lens.push_back(std::min(last, kLengths[b]));
  }
  const Exact<int64_t> t(tokens), p(positions), s(slots), rows(std::vector<int64_t>{0, 1}), at(begin),
      contexts(lens);
  const Matrix hidden(DType::kFloat32, t.size(), kHidden), logits(DType::kFloat32, t.size(), kVocabulary);
  const bool wants_hidden = threads != 2;
  decode(model.view,
         {.tokens = t.data(),
          .positions = p.data(),
          .slots = s.data(),
          .total = t.size(),
          .req_to_token = table.data(),
          .row_stride = kLengths[0],
          .rows = rows.data(),
          .query_begin = at.data(),
          .context_lens = contexts.data(),
          .requests = 2,
          .shadows = nullptr,
          .shadow_valid = nullptr,
          .hidden_out = wants_hidden ? hidden.as<float>() : nullptr,
          .logits_out = logits.as<float>(),
          .threads = threads},
         buffers);
  Matrix copy(DType::kFloat32, t.size(), kVocabulary);
  for (int64_t i = 0; i < t.size(); ++i) {
    for (int64_t v = 0; v < kVocabulary; ++v) copy.set(i, v, logits.at(i, v));
  }
  return copy;
}

// Logits of the tokens of one request.
std::vector<std::vector<double>> expected_logits(const Model& model, int64_t b) {
  std::vector<std::vector<double>> hidden, logits;
  for (int64_t p = 0; p < kLengths[b]; ++p) {
    hidden.emplace_back();
    for (int64_t i = 0; i < kHidden; ++i)
      hidden[p].push_back(model.embedding.at((p * 5 + b * 3) % kVocabulary, i));
  }
  for (const Layer& layer : model.layers) {
    std::vector<std::vector<double>> heads;  // of all positions
    for (int64_t p = 0; p < kLengths[b]; ++p) {
      std::vector<double> qkv = layer.qkv(normed(hidden[p], layer.input_norm));
      for (int head = 0; head < kHeads + kKvHeads; ++head) {
        const auto at = qkv.begin() + head * kDim;
        std::vector<double> x = normed({at, at + kDim}, head < kHeads ? layer.q_norm : layer.k_norm);
        for (int j = 0; j < kRotary / 2; ++j) {
          const double u = x[j], v = x[j + kRotary / 2];
          const double c = model.table.at(p, j), s = model.table.at(p, kRotary / 2 + j);
          x[j] = u * c - v * s, x[j + kRotary / 2] = v * c + u * s;
        }
        std::copy(x.begin(), x.end(), at);
      }
      heads.push_back(qkv);
    }
    for (int64_t p = 0; p < kLengths[b]; ++p) {
      std::vector<double> attended(kHeads * kDim);
      for (int head = 0; head < kHeads; ++head) {
        const int key = (kHeads + head / (kHeads / kKvHeads)) * kDim, value = key + kKvHeads * kDim;
        double total = 0.0;
        std::vector<double> sum(kDim);
        for (int64_t seen = 0; seen <= p; ++seen) {
          double score = 0.0;
          for (int d = 0; d < kDim; ++d) score += heads[p][head * kDim + d] * heads[seen][key + d];
          const double weight = std::exp(0.2 * score);
          total += weight;
          for (int d = 0; d < kDim; ++d) sum[d] += weight * heads[seen][value + d];
        }
        for (int d = 0; d < kDim; ++d) attended[head * kDim + d] = sum[d] / total;
      }
      const auto delta = layer.o(attended);
      for (int64_t i = 0; i < kHidden; ++i) hidden[p][i] += delta[i];
      const auto gate_up = layer.gate_up(normed(hidden[p], layer.post_norm));
      std::vector<double> gated;
      for (int64_t i = 0; i < kInner; ++i)
        gated.push_back(gate_up[i] / (1 + std::exp(-gate_up[i])) * gate_up[kInner + i]);
      const auto mlp = layer.down(gated);
      for (int64_t i = 0; i < kHidden; ++i) hidden[p][i] += mlp[i];
    }
  }
  for (const auto& row : hidden) logits.push_back(model.lm_head(normed(row, model.final_norm)));
  return logits;
}

TEST(decode_equals_loops) {
  for (LinearKind kind : {LinearKind::kExact, LinearKind::kW4A16}) {
    Random random(14);
    const Model model(random, kind, DType::kFloat32);
    DecoderBuffers buffers;
    const Matrix logits = run(model, buffers, 0, kLengths[0], 3);
    // An input next to the middle of two bf16 values may be rounded either way.
    const double tolerance = model.lm_head.rounds_x() ? 3e-2 : 1e-3;
    for (int64_t b = 0; b < 2; ++b) {
      const auto expected = expected_logits(model, b);
      for (int64_t p = 0; p < kLengths[b]; ++p) {
        for (int64_t v = 0; v < kVocabulary; ++v)
          CHECK_NEAR(logits.at(b * kLengths[0] + p, v), expected[p][v], tolerance);
      }
    }
  }
}

TEST(a_token_depends_on_its_context_only) {
  for (LinearKind kind : {LinearKind::kExact, LinearKind::kW4A16, LinearKind::kW4A8}) {
    for (DType kv_type : kDTypes) {
      Random random(15);
      const Model model(random, kind, kv_type);
      DecoderBuffers buffers;
      const Matrix whole = run(model, buffers, 0, kLengths[0], 1);
      CHECK(whole.rows == kTokens);
      CHECK(run(model, buffers, 0, kLengths[0], 2) == whole &&
            run(model, buffers, 0, kLengths[0], 3) == whole);
      for (int64_t first = 0, last = 1; first < kLengths[0]; first = last, last += 2) {
        const Matrix part = run(model, buffers, first, last, 1 + first % 3);
        for (int64_t i = 0; i < part.rows; ++i) {
          const int64_t of_first = std::min(last, kLengths[0]) - first, b = i < of_first ? 0 : 1;
          const int64_t row = b * kLengths[0] + first + i - b * of_first;
          for (int64_t v = 0; v < kVocabulary; ++v) CHECK(part.at(i, v) == whole.at(row, v));
        }
      }
    }
  }
}

}  // namespace
}  // namespace sglang_er::cpu
