// dequant_attention, its kernels whole, against a plain loop in double: contexts of several chunks, requests
// with several tokens, slots that the shadow does not have, fewer blocks than there is work.
#include <algorithm>

#include "dequant_attention_kernel.h"
#include "kv_shadow_op.h"
#include "paged_pool.h"

namespace sglang_er::simt {
namespace {

using namespace cpu;
using namespace cuda;

std::vector<double> rotated(std::vector<double> x) {
  const int dim = static_cast<int>(x.size());
  for (int half = 1; half < dim; half *= 2) {
    for (int i = 0; i < dim; ++i) {
      if ((i & half) != 0) continue;
      const double a = x[i], b = x[i + half];
      x[i] = a + b, x[i + half] = a - b;
    }
  }
  for (double& value : x) value /= std::sqrt(dim);
  return x;
}

struct Call {
  const Pool& pool;
  const Shadow& shadow;
  int exact_newest;
  int dim, group;
  double scale = 1.0 / std::sqrt(dim);

  int64_t slot(int64_t request, int64_t position) const {
    return pool.table[pool.rows[request] * pool.columns + position];
  }
  bool in_shadow(int64_t request, int64_t position) const {
    return position < pool.context_lens[request] - exact_newest && shadow.valid[slot(request, position)] != 0;
  }
  int64_t visible(int64_t request, int64_t token) const {
    return pool.context_lens[request] - (pool.query_begin[request + 1] - token) + 1;
  }

  // Softmax-weighted values, and the largest sum of weights * |value| of a dimension.
  std::pair<std::vector<double>, double> expected(int64_t request, int64_t token, int head) const {
    std::vector<double> q(dim), out(dim), magnitude(dim);
    for (int d = 0; d < dim; ++d) q[d] = pool.q.at(token, head * dim + d);
    const std::vector<double> turned = rotated(q);
    double sum = 0.0;
    for (int64_t p = 0; p < visible(request, token); ++p) {
      const int64_t at = slot(request, p), first = int64_t{head / group} * dim;
      const int64_t vector = at * pool.dims.kv_heads + head / group;
      const bool quantized = in_shadow(request, p);
      double score = 0.0;
      for (int d = 0; d < dim; ++d) {
        score += quantized ? turned[d] * shadow.dequantized(false, vector, dim, d)
                           : q[d] * pool.keys.at(at, first + d);
      }
      const double weight = std::exp(score * scale);
      sum += weight;
      for (int d = 0; d < dim; ++d) {
        const double value =
            quantized ? shadow.dequantized(true, vector, dim, d) : pool.values.at(at, first + d);
        out[d] += weight * value;
        magnitude[d] += weight * std::abs(value);
      }
    }
    for (double& value : out) value /= sum;
    return {out, *std::max_element(magnitude.begin(), magnitude.end()) / sum};
  }
};

template <int Dim, int HeadTiles>
void check(Random& random, int kv_heads, int group, const std::vector<Request>& requests, double share,
           int exact_newest, bool out_is_float) {
  Pool pool(random, {kv_heads * group, kv_heads, Dim, Dim}, requests, DType::kBFloat16, DType::kBFloat16, 0);
  const Shadow shadow(pool, 4);
  std::vector<int64_t> slots;
  for (int64_t s = 0; s < pool.slots; ++s) {
    shadow.valid[s] = uniform(random) < share ? 1 : 0;
    if (shadow.valid[s] != 0) slots.push_back(s);
  }
  const Exact<int64_t> stored(slots);
  kv_shadow_store({pool.keys.data(), pool.values.data(), pool.keys.stride, pool.values.stride, pool.keys.type,
                   kv_heads, Dim, Dim, stored.data(), stored.size(), 4, shadow.keys.data(),
                   shadow.values.data(), shadow.key_scales.data(), shadow.value_scales.data(), 1});
  const Call call{pool, shadow, exact_newest, Dim, group};
  for (int64_t b = 0; b < pool.rows.size(); ++b) {
    for (int64_t p = 0; p < pool.context_lens[b]; ++p) {  // what must not be read
      const int64_t slot = call.slot(b, p);
      if (call.in_shadow(b, p)) pool.keys.set(slot, 0, kNaN), pool.values.set(slot, kv_heads * Dim - 1, kNaN);
    }
  }
  const int chunks = most_chunks(pool.columns);
  const int64_t parts = pool.tokens * kv_heads * group * chunks;
  const Exact<float4> values(parts * Dim / 4, {NAN, NAN, NAN, NAN});
  const Exact<float2> sums(parts, {NAN, NAN});
  Matrix out(out_is_float ? DType::kFloat32 : DType::kBFloat16, pool.tokens, int64_t{kv_heads} * group * Dim);
  const DequantAttentionParams params{.q = pool.q.as<uint16_t>(),
                                      .q_stride = pool.q.stride,
                                      .keys = pool.keys.as<uint16_t>(),
                                      .values = pool.values.as<uint16_t>(),
                                      .key_stride = pool.keys.stride,
                                      .value_stride = pool.values.stride,
                                      .shadow_keys = shadow.keys.data(),
                                      .shadow_values = shadow.values.data(),
                                      .key_scales = shadow.key_scales.data(),
                                      .value_scales = shadow.value_scales.data(),
                                      .valid = shadow.valid.data(),
                                      .req_to_token = pool.table.data(),
                                      .row_stride = pool.columns,
                                      .rows = pool.rows.data(),
                                      .query_begin = pool.query_begin.data(),
                                      .context_lens = pool.context_lens.data(),
                                      .tokens = static_cast<int>(pool.tokens),
                                      .requests = static_cast<int>(pool.rows.size()),
                                      .kv_heads = kv_heads,
                                      .group = group,
                                      .exact_newest = exact_newest,
                                      .chunks = chunks,
                                      .score_factor = static_cast<float>(call.scale / std::log(2.0)),
                                      .norm = rotation_norm(Dim),
                                      .partial_values = reinterpret_cast<float*>(values.data()),
                                      .partial_sums = sums.data(),
                                      .out = out.data(),
                                      .out_stride = out.stride};
  static_assert(sizeof(cuda::Shared<Dim, HeadTiles>) <= kSharedBytes);
  const unsigned blocks = 1 + static_cast<unsigned>(random() % 4);
  launch(attend<Dim, HeadTiles>, dim3{blocks}, kWarps * 32, random, params, memory, kSharedBytes);
  const dim3 grid{static_cast<unsigned>(kv_heads), static_cast<unsigned>(pool.tokens)};
  if (out_is_float) {
    launch(combine<Dim, float>, grid, group * 32, random, params, memory, kSharedBytes);
  } else {
    launch(combine<Dim, uint16_t>, grid, group * 32, random, params, memory, kSharedBytes);
  }
  for (int64_t b = 0; b < pool.rows.size(); ++b) {
    for (int64_t token = pool.query_begin[b]; token < pool.query_begin[b + 1]; ++token) {
      for (int head = 0; head < kv_heads * group; ++head) {
        const auto [truth, magnitude] = call.expected(b, token, head);
        for (int d = 0; d < Dim; ++d)
          CHECK_NEAR(out.at(token, head * Dim + d), truth[d],
                     1e-4 + (0x1p-9 + (out_is_float ? 0.0 : 0x1p-8)) * magnitude);
      }
    }
  }
}

SIMT_TEST(dequant_attention_equals_loops) {
  Random random(32);
  check<128, 1>(random, 1, 7, {{1101, 1}, {33, 1}, {1, 1}}, 1.0, 70, true);
  check<128, 1>(random, 2, 4, {{150, 3}, {64, 1}}, 0.8, 3, false);
  check<128, 2>(random, 1, 12, {{700, 1}, {40, 2}}, 0.9, 32, false);
  check<64, 1>(random, 1, 8, {{530, 1}, {17, 2}}, 1.0, 0, true);
  check<64, 1>(random, 2, 1, {{200, 1}}, 0.5, 20, false);
  check<64, 2>(random, 1, 16, {{1300, 1}, {129, 1}}, 0.0, 0, true);
}

}  // namespace
}  // namespace sglang_er::simt
