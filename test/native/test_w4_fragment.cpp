// What the CUDA products from packed weights are made of; the kernels themselves run in simt/.
#include "sglang_er/w4_fragment.h"
#include "sglang_er/w4a8_fragment.h"
#include "testing.h"

namespace sglang_er::cpu {
namespace {

template <bool IsHalf>
double element(uint32_t pair, int half) {
  return w4::input_value<IsHalf>(static_cast<uint16_t>(pair >> 16 * half));
}

TEST(w4_pair_values_are_sixteen_plus_the_level) {
  for (uint32_t low = 0; low < 16; ++low) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t high = 15 - low, noise = 0xA5A5A5A5u & ~(0x000F000Fu << 4 * i);
      const uint32_t word = noise | low << nibble_shift(0, i) | high << nibble_shift(1, i);
      CHECK(element<false>(w4::pair_value<false>(word, i), 0) == 16.0 + low);
      CHECK(element<false>(w4::pair_value<false>(word, i), 1) == 16.0 + high);
      CHECK(element<true>(w4::pair_value<true>(word, i), 0) == 16.0 + low);
      CHECK(element<true>(w4::pair_value<true>(word, i), 1) == 16.0 + high);
    }
  }
}

TEST(w4_schedules_cover_every_group_once_and_fit_the_workspace) {
  for (const int64_t rows : {1, 128, 129, 512, 3584, 4608, 18944, 37888, 152064}) {
    for (const int64_t cols : {0, 1, 128, 129, 896, 3584, 4864, 18944}) {
      const w4::Schedule cut = w4::schedule(rows, cols);
      const int64_t groups = (cols + w4::kGroup - 1) / w4::kGroup;
      CHECK(int64_t{cut.tiles} * w4::kTileRows >= rows && int64_t{cut.tiles - 1} * w4::kTileRows < rows);
      CHECK(cut.split_groups % w4::kPhases == 0);
      CHECK(int64_t{cut.splits} * cut.split_groups >= groups &&
            int64_t{cut.splits - 1} * cut.split_groups < std::max<int64_t>(groups, 1));
      CHECK(cut.splits == 1 || cut.tiles * cut.splits <= w4::kMostParts);
    }
  }
  CHECK(w4::schedule(3584, 3584).splits > 1 && w4::schedule(152064, 3584).splits == 1);
}

TEST(w4a8_levels_lie_where_their_nibbles_are) {
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    for (int c = 0; c < w4a8::kLaneLevels; ++c) {
      const int place = lane * w4a8::kLaneLevels + c, nibble = place / w4a8::kHalf;
      const int word = place % w4a8::kHalf / 4, shift = 8 * c + 4 * nibble;
      CHECK(w4a8::first_input(lane, c % 2) + c / 2 ==
            nibble_input(w4::kGroup, word, shift / 16, shift % 16 / 4));
    }
  }
}

}  // namespace
}  // namespace sglang_er::cpu
