// What the CUDA kernel dequant_attention is made of; the kernel itself runs in simt/.
#include <algorithm>
#include <array>

#include "sglang_er/dequant_attention.h"
#include "sglang_er/split_schedule.h"
#include "testing.h"

namespace sglang_er::cpu {
namespace {

using namespace dequant_attention;
using Lanes = std::array<int, 32>;  // what each lane of a warp holds

double half(uint32_t word, int i) { return bf16_to_float(static_cast<uint16_t>(word >> (16 * i))); }

// 16-byte units or single words that lanes read at once touch every bank of shared memory at most once.
bool conflict_free(const Lanes& offsets, int bytes) {
  const int at_once = 128 / bytes;
  for (int first = 0; first < 32; first += at_once) {
    uint32_t banks = 0;
    for (int lane = first; lane < first + at_once; ++lane) {
      for (int word = 0; word < bytes / 4; ++word) {
        const uint32_t bank = 1u << ((offsets[lane] / 4 + word) % 32);
        if ((banks & bank) != 0) return false;
        banks |= bank;
      }
    }
  }
  return true;
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
    Lanes offsets;
    for (int high : {0, 8}) {
      for (int lane = 0; lane < 32; ++lane) offsets[lane] = L::key_offset(tile + high + lane / 4, lane);
      CHECK(conflict_free(offsets, 4 * L::kKeyWords));
    }
    for (int r = 0; r < 4; ++r) {
      for (int lane = 0; lane < 32; ++lane) offsets[lane] = L::value_offset(tile + value_row(lane, r), lane);
      CHECK(conflict_free(offsets, 4 * L::kValueWords));
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
        CHECK(half(keys, h) == 128 + (word >> shift & 15));
        CHECK(half(values, h) == 2.0 * (word >> shift & 15) - 15.0);
      }
    }
  }
}

}  // namespace
}  // namespace sglang_er::cpu
