// The arithmetic of the CUDA kernel dequant_attention, from the query to the merged result, against a plain
// loop in double precision.
#include "dequant_block.h"
#include "kv_shadow_op.h"

namespace sglang_er::cpu {
namespace {

using warp::Attended;
using warp::Block;

template <int Dim>
void check(Random& random, int kv_heads, int group, const std::vector<Request>& requests, double share,
           int exact_newest) {
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
  for (int64_t b = 0; b < pool.rows.size(); ++b) {
    for (int64_t p = 0; p < pool.context_lens[b] - exact_newest; ++p) {  // what must not be read
      const int64_t slot = pool.table[pool.rows[b] * pool.columns + p];
      if (shadow.valid[slot] != 0)
        pool.keys.set(slot, 0, kNaN), pool.values.set(slot, kv_heads * Dim - 1, kNaN);
    }
    for (int64_t token = pool.query_begin[b]; token < pool.query_begin[b + 1]; ++token) {
      for (int head = 0; head < kv_heads; ++head) {
        Block<Dim> block{pool, shadow, exact_newest, 1.0 / std::sqrt(Dim), b, token, head, group};
        const std::vector<Attended> actual = block.run();
        for (int h = 0; h < group; ++h) {
          const Attended expected = block.expected(h);
          CHECK_NEAR(actual[h].log_sum, expected.log_sum, 1e-4);
          for (int d = 0; d < Dim; ++d)
            CHECK_NEAR(actual[h].out[d], expected.out[d], 1e-4 + 0x1p-9 * expected.magnitude);
        }
      }
    }
  }
}

TEST(warps_attend_to_the_shadow_and_the_pool) {
  Random random(32);
  check<128>(random, 1, 7, {{1101, 1}, {33, 1}, {1, 1}}, 1.0, 70);
  check<128>(random, 2, 4, {{150, 3}, {64, 1}}, 0.8, 3);
  check<64>(random, 1, 8, {{530, 1}, {17, 2}}, 1.0, 0);
  check<64>(random, 2, 1, {{200, 1}}, 0.5, 20);
}

}  // namespace
}  // namespace sglang_er::cpu
