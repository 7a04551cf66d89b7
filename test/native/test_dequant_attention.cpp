// The arithmetic of the CUDA kernels dequant_attention and kv_shadow_store, warp by warp, against plain
// loops.
#include <algorithm>

#include "kv_shadow_op.h"
#include "paged_pool.h"
#include "sglang_er/dequant_attention.h"
#include "sglang_er/kv_shadow_quantize.h"
#include "sglang_er/rotation.h"
#include "sglang_er/split_schedule.h"
#include "warp.h"

namespace sglang_er::cpu {
namespace {

using namespace dequant_attention;
using warp::Lanes;

// One vector through a warp, as in kv_shadow_store.cu.
template <int E>
void store_vector(const std::vector<float>& vector, int bits, bool rotated, uint8_t* out, uint16_t* scale) {
  const int dim = static_cast<int>(vector.size());
  Lanes<std::array<float, E>> x{};
  Lanes<float> largest{};
  for (int d = 0; d < dim; ++d) x[d / E][d % E] = vector[d];
  if (rotated) {
    for (auto& lane : x) butterflies_in_lane<E>(*reinterpret_cast<float (*)[E]>(lane.data()));
    for (int half = E; half < rotation_block(dim); half *= 2) {
      const auto before = x;
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < E; ++i)
          x[lane][i] = butterfly(before[lane][i], before[lane ^ half / E][i], (lane & half / E) != 0);
      }
    }
    for (auto& lane : x) {
      for (float& value : lane) value *= rotation_norm(dim);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (float value : x[lane]) largest[lane] = std::max(largest[lane], std::abs(value));
  }
  largest = warp::reduce(largest, 1, [](float a, float b) { return std::max(a, b); });
  const ShadowFormat format = bits == 8 ? ShadowFormat::kInt8 : ShadowFormat::kInt4;
  *scale = shadow_scale_bits(largest[7], format);
  Lanes<uint64_t> bytes;
  Lanes<uint32_t> nibbles;
  for (int lane = 0; lane < 32; ++lane) {
    int levels[E];
    for (int i = 0; i < E; ++i) levels[i] = shadow_level(x[lane][i], shadow_inverse_scale(*scale), format);
    bytes[lane] = level_bytes<E>(levels);
    nibbles[lane] = key_nibbles<E>(levels);
  }
  for (int lane = 0; lane * E < dim; ++lane) {
    if (bits == 8) {
      std::memcpy(out + lane * E, &bytes[lane], E);
    } else if (rotated) {
      std::memcpy(out + lane * (E / 2), &nibbles[lane], E / 2);
    } else if (writes_value<E>(lane)) {
      const uint64_t joined = value_nibbles(bytes[lane], bytes[lane ^ value_partner<E>()]);
      std::memcpy(out + value_byte<E>(lane), &joined, E);
    }
  }
}

TEST(a_warp_quantizes_as_the_cpu_does) {
  Random random(31);
  for (int bits : {4, 8}) {
    for (const Dims& dims : {Dims{2, 2, 64, 64},
                             {1, 1, 96, 128},
                             {1, 1, 128, 32},
                             {2, 2, 160, 96},
                             {1, 1, 256, 64},
                             {1, 1, 64, 256}}) {
      Pool pool(random, dims, {{9, 1}, {4, 1}}, DType::kBFloat16, DType::kBFloat16, 3);
      for (int d = 0; d < dims.head_dim; ++d)
        pool.keys.set(2, d, 0.0), pool.keys.set(3, d, pool.keys.at(3, d) * 1e-39);
      const Shadow expected(pool, bits), actual(pool, bits);
      std::vector<int64_t> slots(static_cast<size_t>(pool.slots));
      std::iota(slots.begin(), slots.end(), 0);
      const Exact<int64_t> all(slots);
      kv_shadow_store({pool.keys.data(), pool.values.data(), pool.keys.stride, pool.values.stride,
                       pool.keys.type, dims.kv_heads, dims.head_dim, dims.value_dim, all.data(), all.size(),
                       bits, expected.keys.data(), expected.values.data(), expected.key_scales.data(),
                       expected.value_scales.data(), 1});
      for (int64_t vector = 0; vector < pool.slots * dims.kv_heads; ++vector) {
        for (bool value : {false, true}) {
          const int dim = value ? dims.value_dim : dims.head_dim;
          std::vector<float> x(dim);
          for (int d = 0; d < dim; ++d) {
            x[d] = static_cast<float>((value ? pool.values : pool.keys)
                                          .at(vector / dims.kv_heads, vector % dims.kv_heads * dim + d));
          }
          uint8_t* out = (value ? actual.values : actual.keys).data() + vector * dim * bits / 8;
          uint16_t* scale = (value ? actual.value_scales : actual.key_scales).data() + vector;
          const int elements = lane_elements(std::max(dims.head_dim, dims.value_dim));
          const auto store = elements == 2   ? store_vector<2>
                             : elements == 4 ? store_vector<4>
                                             : store_vector<8>;
          store(x, bits, bits == 4 && !value, out, scale);
        }
      }
      const auto same = [](const auto& a, const auto& b) {
        return std::memcmp(a.data(), b.data(), static_cast<size_t>(a.size()) * sizeof(a[0])) == 0;
      };
      CHECK(same(actual.keys, expected.keys) && same(actual.values, expected.values));
      CHECK(same(actual.key_scales, expected.key_scales) && same(actual.value_scales, expected.value_scales));
    }
  }
}

TEST(chunks_cover_a_context) {
  for (int64_t context : {int64_t{1}, int64_t{511}, int64_t{512}, int64_t{513}, int64_t{16384},
                          int64_t{16385}, int64_t{99999}, kMaxScheduledContext}) {
    const int chunks = chunks_of(context);
    CHECK(chunks >= 1 && chunks <= kMaxChunks && chunks <= most_chunks(context));
    CHECK(chunk_tokens(context) % (kWarps * kStepTokens) == 0);
    CHECK((chunks - 1) * chunk_tokens(context) < context && chunks * chunk_tokens(context) >= context);
  }
  CHECK(chunks_of(0) == 0 && most_chunks(0) == 0);

  const int64_t query_begin[] = {0, 0, 1, 4, 4, 5};  // requests with 0, 1, 3, 0, 1 tokens
  const int64_t context_lens[] = {7, 700, 515, 9, 1};
  const int requests[] = {1, 2, 2, 2, 4}, visible[] = {700, 513, 514, 515, 1};
  int first_chunk[6] = {};
  for (int token = 0; token < 5; ++token) {
    CHECK(request_of_token(query_begin, 5, token) == requests[token]);
    CHECK(visible_tokens(query_begin, context_lens, requests[token], token) == visible[token]);
    first_chunk[token + 1] = first_chunk[token] + chunks_of(token == 3 ? 0 : visible[token]);
  }
  int expected = 0;
  for (int token : {0, 0, 1, 1, 2, 2, 4}) {
    const ScheduledChunk scheduled = scheduled_chunk(first_chunk, 5, expected++);
    CHECK(scheduled.token == token && first_chunk[token] + scheduled.chunk == expected - 1);
  }
  CHECK(expected == first_chunk[5]);
}

TEST(steps_of_a_warp) {
  for (int first : {0, 32, 608}) {
    for (int limit = 1; limit < first + 700; ++limit) {
      int steps = 0;
      while (step_position(first, steps) < limit) ++steps;
      CHECK(steps_before(first, limit) == steps);
      int past = 0;
      while (step_position(first, past) + kStepTokens <= limit) ++past;
      CHECK(first_step_past(first, limit) == step_position(first, past));
    }
  }
}

template <int Dim>
void check_shared_memory() {
  using L = Layout<Dim>;
  std::vector<int> uses(L::kStepBytes / 16);
  for (int row = 0; row < kStepTokens; ++row) {
    for (int unit = 0; unit < L::kRowUnits; ++unit) ++uses[L::unit_offset(row, unit) / 16];
  }
  CHECK(std::all_of(uses.begin(), uses.end(), [](int count) { return count == 1; }));
  for (int tile = 0; tile < kStepTokens; tile += kTileTokens) {
    Lanes<int> offsets;
    for (int high : {0, 8}) {
      for (int lane = 0; lane < 32; ++lane) offsets[lane] = L::key_offset(tile + high + lane / 4, lane);
      CHECK(warp::conflict_free(offsets, 4 * L::kKeyWords));
    }
    for (int r = 0; r < 4; ++r) {
      for (int lane = 0; lane < 32; ++lane) offsets[lane] = L::value_offset(tile + value_row(lane, r), lane);
      CHECK(warp::conflict_free(offsets, 4 * L::kValueWords));
    }
  }
}
TEST(reads_of_shared_memory_do_not_collide) {
  check_shared_memory<64>();
  check_shared_memory<128>();
}

TEST(levels_are_exact) {
  for (uint32_t word : {0x76543210u, 0xFEDCBA98u, 0x0F0F0F0Fu, 0xFFFFFFFFu, 0u}) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t keys = key_pair(word, i), values = subtract_144(odd_levels(word, i));
      for (int h = 0; h < 2; ++h) {
        const int shift = 4 * i + 16 * h;
        CHECK(warp::half(keys, h) == 128 + (word >> shift & 15));
        CHECK(warp::half(values, h) == 2.0 * (word >> shift & 15) - 15.0);
      }
    }
  }
}

}  // namespace
}  // namespace sglang_er::cpu
