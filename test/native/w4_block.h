// Blocks of threads of the CUDA products from packed weights without a GPU: tiles, splits and phases in the
// order of csrc/cuda/w4_linear_block.h, for what a warp adds to a lane's sums.
#pragma once

#include <algorithm>

#include "packed.h"
#include "sglang_er/mma.h"
#include "sglang_er/w4_fragment.h"
#include "testing.h"

namespace sglang_er::cpu {

struct WarpSums {
  float of[mma::kLanes][w4::kProducts][4] = {};
};

// The 16 bytes that every lane has of a word step.
inline void load_words(const Packed& packed, const int64_t (&blocks)[2], int64_t group, int jb,
                       uint32_t (&words)[mma::kLanes][w4::kLaneRows]) {
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    const int64_t first = (blocks[w4::lane_block(lane)] * packed.shape.groups() + group) * w4::kGroupBytes;
    const uint8_t* from = packed.packed.data() + first + w4::lane_byte(lane) + jb * w4::kWordStepBytes;
    CHECK((from - packed.packed.data()) % 16 == 0);
    std::memcpy(words[lane], from, 16);
  }
}

// fold(total, lane, p, reg, scale, zero) for every sum of a warp, with its row's numbers.
template <class Fold>
void fold_group(const Packed& packed, const int64_t (&blocks)[2], int64_t group, WarpSums& totals,
                const Fold& fold) {
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    for (int p = 0; p < w4::kProducts; ++p) {
      for (int reg = 0; reg < 4; ++reg) {
        const int64_t row =
            blocks[w4::lane_block(lane)] * kRowBlock + w4::lane_first_row(lane) + w4::output_row(p, reg);
        float& total = totals.of[lane][p][reg];
        total = fold(total, lane, p, reg, bf16_to_float(packed.meta(row, group, 0)),
                     bf16_to_float(packed.meta(row, group, 1)));
      }
    }
  }
}

// out [m, rows of the weight]; multiply(blocks, first_row, group, totals) adds a group of two blocks of rows
// for 8 rows of x.
template <class Multiply>
std::vector<float> linear_by_blocks(const Packed& packed, int64_t rows_of_x, const Multiply& multiply) {
  const PackedShape& shape = packed.shape;
  const w4::Schedule schedule = w4::schedule(shape.rows, shape.cols);
  std::vector<float> out(static_cast<size_t>(rows_of_x * shape.rows), static_cast<float>(kNaN));
  for (int pair = 0; pair < schedule.tiles * w4::kRowPairs; ++pair) {
    const int64_t last = shape.row_blocks() - 1;
    const int64_t blocks[2] = {std::min<int64_t>(pair * 2, last), std::min<int64_t>(pair * 2 + 1, last)};
    for (int64_t first_row = 0; first_row < rows_of_x; first_row += mma::kCols) {
      WarpSums sum;
      for (int split = 0; split < schedule.splits; ++split) {
        const int64_t begin = int64_t{split} * schedule.split_groups;
        const int64_t end = std::min<int64_t>(begin + schedule.split_groups, shape.groups());
        CHECK(begin < end && (split + 1 < schedule.splits || end == shape.groups()));
        WarpSums phases[w4::kPhases];
        for (int64_t group = begin; group < end; ++group)
          multiply(blocks, first_row, group, phases[(group - begin) % w4::kPhases]);
        for (int lane = 0; lane < mma::kLanes; ++lane) {
          for (int p = 0; p < w4::kProducts; ++p) {
            for (int reg = 0; reg < 4; ++reg)
              sum.of[lane][p][reg] += phases[0].of[lane][p][reg] + phases[1].of[lane][p][reg];
          }
        }
      }
      for (int lane = 0; lane < mma::kLanes; ++lane) {
        for (int p = 0; p < w4::kProducts; ++p) {
          for (int reg = 0; reg < 4; ++reg) {
            const int64_t n = (int64_t{pair} * 2 + w4::lane_block(lane)) * kRowBlock +
                              w4::lane_first_row(lane) + w4::output_row(p, reg);
            const int64_t m = first_row + mma::c_col(lane, reg);
            if (n < shape.rows && m < rows_of_x)
              out[static_cast<size_t>(m * shape.rows + n)] = sum.of[lane][p][reg];
          }
        }
      }
    }
  }
  return out;
}

struct LinearShape {
  int64_t m, n, k;
};
inline constexpr LinearShape kLinearShapes[] = {{1, 1, 1},     {3, 16, 127},   {8, 33, 128},
                                                {9, 130, 300}, {16, 47, 1000}, {2, 257, 520}};

}  // namespace sglang_er::cpu
