// paged_attention over a pool and its shadow, and kv_shadow_store, against plain loops.
#include <algorithm>

#include "kv_shadow_op.h"
#include "paged_pool.h"

namespace sglang_er::cpu {
namespace {

// The rule of kv_shadow.h, in its own fp32 arithmetic: levels and the scale of one vector.
std::vector<double> quantized(std::vector<float> x, int bits, bool rotated, uint16_t* scale_bits) {
  const int dim = static_cast<int>(x.size());
  if (rotated) {
    const int block = rotation_block(dim);
    for (int half = 1; half < block; half *= 2) {
      for (int i = 0; i < dim; ++i) {
        if ((i & half) != 0) continue;
        const float a = x[i], b = x[i + half];
        x[i] = a + b, x[i + half] = a - b;
      }
    }
    for (float& value : x) value *= 1.0f / std::sqrt(static_cast<float>(block));
  }
  float largest = 0.0f;
  for (float value : x) largest = std::max(largest, std::abs(value));
  *scale_bits = std::max<uint16_t>(float_to_bf16(largest / (bits == 8 ? 127.0f : 8.0f)), 0x0080);
  const float inverse = 1.0f / bf16_to_float(*scale_bits);
  std::vector<double> levels;
  for (float value : x) {
    levels.push_back(bits == 8 ? std::clamp(std::nearbyint(value * inverse), -127.0f, 127.0f)
                               : std::clamp(std::nearbyint(value * inverse + 7.5f), 0.0f, 15.0f));
  }
  return levels;
}

void store(const Pool& pool, const Shadow& shadow, const Exact<int64_t>& slots, int threads) {
  kv_shadow_store({pool.keys.data(), pool.values.data(), pool.keys.stride, pool.values.stride, pool.keys.type,
                   pool.dims.kv_heads, pool.dims.head_dim, pool.dims.value_dim, slots.data(), slots.size(),
                   shadow.bits, shadow.keys.data(), shadow.values.data(), shadow.key_scales.data(),
                   shadow.value_scales.data(), threads});
}

// Stores a random share of the slots and checks every level and scale.
Shadow checked_shadow(Random& random, const Pool& pool, int bits, double share, int threads) {
  Shadow shadow(pool, bits);
  std::vector<int64_t> slots;
  for (int64_t s = 0; s < pool.slots; ++s) {
    shadow.valid[s] = uniform(random) < share ? 1 : 0;
    if (shadow.valid[s] != 0) slots.push_back(s);
  }
  store(pool, shadow, Exact<int64_t>(slots), threads);
  for (int64_t vector = 0; vector < pool.slots * pool.dims.kv_heads; ++vector) {
    const int64_t slot = vector / pool.dims.kv_heads, head = vector % pool.dims.kv_heads;
    for (bool value : {false, true}) {
      const int dim = value ? pool.dims.value_dim : pool.dims.head_dim;
      std::vector<float> x(dim);
      for (int d = 0; d < dim; ++d)
        x[d] = static_cast<float>((value ? pool.values : pool.keys).at(slot, head * dim + d));
      uint16_t expected = 0;
      const auto levels = quantized(x, bits, bits == 4 && !value, &expected);
      const uint16_t scale = (value ? shadow.value_scales : shadow.key_scales)[vector];
      if (shadow.valid[slot] == 0) {
        CHECK(scale == 0x7FC0);
        continue;
      }
      CHECK(scale == expected);
      for (int d = 0; d < dim; ++d) CHECK(shadow.level(value, vector, dim, d) == levels[d]);
    }
  }
  return shadow;
}

std::vector<double> rotated(std::vector<double> x) {
  const int dim = static_cast<int>(x.size()), block = rotation_block(dim);
  for (int half = 1; half < block; half *= 2) {
    for (int i = 0; i < dim; ++i) {
      if ((i & half) != 0) continue;
      const double a = x[i], b = x[i + half];
      x[i] = a + b, x[i + half] = a - b;
    }
  }
  for (double& value : x) value /= std::sqrt(block);
  return x;
}

// One query head of one token: positions [first, last] of request b, from the pool or the shadow.
std::vector<double> attended(const Pool& pool, const Shadow* shadow, int exact_newest, double scale,
                             int64_t b, int64_t token, int head, int64_t first, int64_t last) {
  const auto [q_heads, kv_heads, dim, value_dim] = pool.dims;
  const int64_t kv_head = head / (q_heads / kv_heads);
  std::vector<double> query(dim), out(value_dim), scores;
  for (int d = 0; d < dim; ++d) query[d] = pool.q.at(token, int64_t{head} * dim + d);
  const std::vector<double> turned = shadow != nullptr && shadow->bits == 4 ? rotated(query) : query;
  const auto slot_of = [&](int64_t p) { return int64_t{pool.table[pool.rows[b] * pool.columns + p]}; };
  const auto in_shadow = [&](int64_t p) {
    return shadow != nullptr && p < pool.context_lens[b] - exact_newest && shadow->valid[slot_of(p)] != 0;
  };
  for (int64_t p = first; p <= last; ++p) {
    double score = 0.0;
    for (int d = 0; d < dim; ++d) {
      score += in_shadow(p) ? turned[d] * shadow->dequantized(false, slot_of(p) * kv_heads + kv_head, dim, d)
                            : query[d] * pool.keys.at(slot_of(p), kv_head * dim + d);
    }
    scores.push_back(score * scale);
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  double total = 0.0;
  for (int64_t p = first; p <= last; ++p) {
    const double weight = std::exp(scores[p - first] - largest);
    total += weight;
    for (int d = 0; d < value_dim; ++d) {
      out[d] +=
          weight * (in_shadow(p) ? shadow->dequantized(true, slot_of(p) * kv_heads + kv_head, value_dim, d)
                                 : pool.values.at(slot_of(p), kv_head * value_dim + d));
    }
  }
  for (double& value : out) value /= total;
  return out;
}

void check_attention(const Pool& pool, const Shadow* shadow, int exact_newest, int64_t window, DType out_type,
                     int threads) {
  const auto [q_heads, kv_heads, dim, value_dim] = pool.dims;
  const double scale = 1.0 / std::sqrt(dim);
  const Matrix out(out_type, pool.tokens, int64_t{q_heads} * value_dim, pool.q.stride - pool.q.cols);
  paged_attention({.q = pool.q.data(),
                   .q_stride = pool.q.stride,
                   .q_type = pool.q.type,
                   .keys = pool.keys.data(),
                   .values = pool.values.data(),
                   .key_stride = pool.keys.stride,
                   .value_stride = pool.values.stride,
                   .kv_type = pool.keys.type,
                   .q_heads = q_heads,
                   .kv_heads = kv_heads,
                   .head_dim = dim,
                   .value_dim = value_dim,
                   .req_to_token = pool.table.data(),
                   .row_stride = pool.columns,
                   .rows = pool.rows.data(),
                   .query_begin = pool.query_begin.data(),
                   .context_lens = pool.context_lens.data(),
                   .requests = pool.rows.size(),
                   .scale = static_cast<float>(scale),
                   .window = window,
                   .shadow = shadow == nullptr ? KvShadowView{} : shadow->view(exact_newest),
                   .out = out.data(),
                   .out_stride = out.stride,
                   .out_type = out_type,
                   .threads = threads});
  // Norms of normally distributed vectors, with room; the largest value.
  const double bound = 0x1p-22 * (1 + 4.0 * std::sqrt(dim)) * 6;
  for (int64_t b = 0; b < pool.rows.size(); ++b) {
    for (int64_t token = pool.query_begin[b]; token < pool.query_begin[b + 1]; ++token) {
      const int64_t last = pool.context_lens[b] - (pool.query_begin[b + 1] - token);
      const int64_t first = window < 0 ? 0 : std::max<int64_t>(last - window, 0);
      for (int head = 0; head < q_heads; ++head) {
        const auto expected = attended(pool, shadow, exact_newest, scale, b, token, head, first, last);
        for (int d = 0; d < value_dim; ++d) {
          CHECK_NEAR(out.at(token, int64_t{head} * value_dim + d), expected[d],
                     bound + rounding(out_type) * std::abs(expected[d]));
        }
      }
    }
  }
  CHECK(out.gaps_are_untouched());
}

const std::vector<Request> kMixed = {{531, 1}, {70, 5}, {19, 19}, {513, 2}, {20, 0}, {1, 1}};
constexpr int64_t kWindows[] = {-1, 7, 400, 0};

TEST(paged_attention_equals_loops) {
  Random random(11);
  int i = 0;
  for (const Dims& dims :
       {Dims{1, 1, 8, 8}, {3, 1, 24, 40}, {4, 2, 64, 64}, {7, 1, 40, 8}, {2, 2, 256, 128}}) {
    for (DType type : kDTypes) {
      const Pool pool(random, dims, kMixed, type, kDTypes[i / 2 % 3], i % 2 * 3);
      check_attention(pool, nullptr, 0, kWindows[i % 4], kDTypes[i / 3 % 3], 1 + i % 3);
      ++i;
    }
  }
}

TEST(many_rows_and_one_key) {
  Random random(12);
  for (int threads : {1, 3}) {
    check_attention(Pool(random, {4, 1, 16, 24}, {{90, 90}}, DType::kBFloat16, DType::kFloat32, 0), nullptr,
                    0, -1, DType::kFloat32, threads);
    check_attention(Pool(random, {1, 1, 8, 8}, {{1, 1}}, DType::kBFloat16, DType::kBFloat16, 0), nullptr, 0,
                    -1, DType::kBFloat16, threads);
    check_attention(Pool(random, {1, 1, 64, 64}, {{1537, 1}}, DType::kBFloat16, DType::kFloat32, 0), nullptr,
                    0, -1, DType::kFloat32, threads);
  }
}

TEST(paged_attention_reads_the_shadow) {
  Random random(13);
  int i = 0;
  for (int bits : {8, 4}) {
    for (const Dims& dims : {Dims{4, 2, 64, 64}, {3, 1, 96, 32}, {2, 1, 32, 96}, {5, 1, 128, 128}}) {
      const Dims used = bits == 8 && i % 2 != 0 ? Dims{dims.q_heads, dims.kv_heads, 24, 40} : dims;
      for (double share : {1.0, 0.6}) {
        const Pool pool(random, used, kMixed, kDTypes[i % 3], DType::kFloat32, i % 2 * 3);
        const Shadow shadow = checked_shadow(random, pool, bits, share, 1 + i % 3);
        check_attention(pool, &shadow, i % 3 * 4, kWindows[i % 3], DType::kFloat32, 1 + i / 2 % 3);
        ++i;
      }
    }
  }
}

}  // namespace
}  // namespace sglang_er::cpu
