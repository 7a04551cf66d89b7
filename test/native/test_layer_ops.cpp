// What lies between the linear layers, against plain loops in double.
#include "layer_ops_op.h"
#include "testing.h"

namespace sglang_er::cpu {
namespace {

double inverse_rms(const std::vector<double>& x, double eps) {
  double squares = 0.0;
  for (double value : x) squares += value * value;
  return 1.0 / std::sqrt(squares / static_cast<double>(x.size()) + eps);
}

TEST(add_rms_norm_equals_loops) {
  Random random(8);
  int i = 0;
  for (int64_t size : {1, 7, 16, 33, 1000}) {
    for (int64_t tokens : {1, 3, 40}) {
      ++i;
      Matrix hidden = Matrix::random(random, DType::kFloat32, tokens, size);
      const Matrix delta = Matrix::random(random, DType::kFloat32, tokens, size);
      const Matrix weight = Matrix::random(random, kDTypes[i % 3], 1, size);
      const Matrix out(DType::kFloat32, tokens, size);
      const bool add = i % 2 == 0;
      std::vector<std::vector<double>> expected(tokens, std::vector<double>(size));
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t k = 0; k < size; ++k) expected[t][k] = hidden.at(t, k) + (add ? delta.at(t, k) : 0.0);
      }
      layer_ops().add_rms_norm({hidden.as<float>(), add ? delta.as<float>() : nullptr, weight.data(),
                                weight.type, 1e-6f, out.as<float>(), tokens, size, 1 + i % 3});
      for (int64_t t = 0; t < tokens; ++t) {
        const double factor = inverse_rms(expected[t], 1e-6);
        for (int64_t k = 0; k < size; ++k) {
          const double value = expected[t][k] * factor * weight.at(0, k);
          CHECK_NEAR(hidden.at(t, k), expected[t][k], 0x1p-22 * (1 + std::abs(expected[t][k])));
          CHECK_NEAR(out.at(t, k), value, 1e-5 * std::abs(value) + 1e-6);
        }
      }
    }
  }
}

TEST(silu_and_mul_equals_loops) {
  Random random(9);
  int i = 0;
  for (int64_t size : {1, 5, 16, 31, 700}) {
    for (int64_t tokens : {1, 37}) {
      ++i;
      Matrix gate_up = Matrix::random(random, DType::kFloat32, tokens, 2 * size);
      gate_up.set(0, 0, -200.0);
      const Matrix out(DType::kFloat32, tokens, size);
      layer_ops().silu_and_mul({gate_up.as<float>(), out.as<float>(), tokens, size, 1 + i % 3});
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t k = 0; k < size; ++k) {
          const double x = gate_up.at(t, k), value = x / (1.0 + std::exp(-x)) * gate_up.at(t, size + k);
          CHECK_NEAR(out.at(t, k), value, 1e-5 * std::abs(value) + 1e-30);
        }
      }
    }
  }
}

struct Heads {
  int q_heads, kv_heads, head_dim, rotary_dim;
};

void check_rotation(Random& random, Heads heads, int64_t tokens, int i) {
  const int64_t dim = heads.head_dim, half = heads.rotary_dim / 2, slots = 2 * tokens + 1, positions = 11;
  const int64_t all = heads.q_heads + 2 * heads.kv_heads, kv = heads.kv_heads * dim;
  const bool neox = i % 2 == 0, normed = i % 3 != 0;
  const Matrix qkv = Matrix::random(random, DType::kFloat32, tokens, all * dim);
  const Matrix table = Matrix::random(random, kDTypes[i % 3], positions, heads.rotary_dim);
  const Matrix q_norm = Matrix::random(random, kDTypes[i / 2 % 3], 1, dim);
  const Matrix k_norm = Matrix::random(random, q_norm.type, 1, dim);
  const Matrix keys(kDTypes[i / 3 % 3], slots, kv, i % 2 * 5), values(keys.type, slots, kv, i % 3);
  Exact<int64_t> at(tokens), slot(tokens);
  Exact<uint8_t> valid(slots, 1);
  for (int64_t t = 0; t < tokens; ++t) at[t] = t * 7 % positions, slot[t] = slots - 1 - 2 * t;
  std::vector<std::vector<double>> expected(tokens, std::vector<double>(all * dim));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t head = 0; head < all; ++head) {
      std::vector<double> x(dim);
      for (int64_t d = 0; d < dim; ++d) x[d] = qkv.at(t, head * dim + d);
      const bool is_value = head >= heads.q_heads + heads.kv_heads;
      const double factor = normed && !is_value ? inverse_rms(x, 1e-5) : 1.0;
      const Matrix& norm = head < heads.q_heads ? q_norm : k_norm;
      if (normed && !is_value) {
        for (int64_t d = 0; d < dim; ++d) x[d] *= factor * norm.at(0, d);
      }
      std::vector<double> y = x;
      for (int64_t j = 0; j < (is_value ? 0 : half); ++j) {
        const int64_t a = neox ? j : 2 * j, b = neox ? j + half : 2 * j + 1;
        const double c = table.at(at[t], j), s = table.at(at[t], half + j);
        y[a] = x[a] * c - x[b] * s;
        y[b] = x[b] * c + x[a] * s;
      }
      for (int64_t d = 0; d < dim; ++d) expected[t][head * dim + d] = y[d];
    }
  }
  layer_ops().rotate_and_store({.qkv = qkv.as<float>(),
                                .tokens = tokens,
                                .q_heads = heads.q_heads,
                                .kv_heads = heads.kv_heads,
                                .head_dim = heads.head_dim,
                                .rotary_dim = heads.rotary_dim,
                                .neox = neox,
                                .cos_sin = table.data(),
                                .cos_sin_type = table.type,
                                .q_norm = normed ? q_norm.data() : nullptr,
                                .k_norm = normed ? k_norm.data() : nullptr,
                                .norm_type = q_norm.type,
                                .eps = 1e-5f,
                                .positions = at.data(),
                                .slots = slot.data(),
                                .keys = keys.data(),
                                .values = values.data(),
                                .key_stride = keys.stride,
                                .value_stride = values.stride,
                                .kv_type = keys.type,
                                .shadow_valid = i % 2 == 0 ? valid.data() : nullptr,
                                .threads = 1 + i % 3});
  const double error = 1e-4, stored = rounding(keys.type);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < (heads.q_heads + heads.kv_heads) * dim; ++j)
      CHECK_NEAR(qkv.at(t, j), expected[t][j], error * (1 + std::abs(expected[t][j])));
    for (int64_t j = 0; j < kv; ++j) {
      const double key = expected[t][heads.q_heads * dim + j],
                   value = expected[t][heads.q_heads * dim + kv + j];
      CHECK_NEAR(keys.at(slot[t], j), key, (error + stored) * (1 + std::abs(key)));
      CHECK_NEAR(values.at(slot[t], j), value, stored * std::abs(value) + denormal(keys.type));
    }
    CHECK(valid[slot[t]] == (i % 2 == 0 ? 0 : 1));
  }
  for (int64_t s = 1; s < slots; s += 2) CHECK(std::isnan(keys.at(s, 0)) && valid[s] == 1);
  CHECK(keys.gaps_are_untouched() && values.gaps_are_untouched());
}

TEST(rotate_and_store_equals_loops) {
  Random random(10);
  int i = 0;
  for (const Heads& heads :
       {Heads{1, 1, 8, 8}, {3, 1, 24, 24}, {4, 2, 40, 12}, {6, 3, 128, 128}, {2, 2, 8, 2}}) {
    for (int64_t tokens : {1, 2, 19}) check_rotation(random, heads, tokens, i++);
  }
}

}  // namespace
}  // namespace sglang_er::cpu
