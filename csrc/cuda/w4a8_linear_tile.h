// A block's part of x in w4a8_linear, and its products. w4a8_linear.cu says who computes what.
#pragma once

#include "sglang_er/w4a8_fragment.h"
#include "w4_linear_tile.h"

namespace sglang_er::cuda {

inline constexpr int kLevelPad =
    16;  // bytes: rows of levels begin 4 banks apart, so that ldmatrix has no conflicts

// x, quantized: rows are an even number of groups, those beyond the last one zero.
struct QuantizedRows {
  uint8_t* levels;            // [m][groups][128], in the order of w4a8_fragment.h
  w4a8::RowNumbers* numbers;  // [m][groups]
  int groups;
};

struct W4A8LinearParams {
  W4LinearParams linear;
  QuantizedRows x;
};

template <int ColTiles>
struct W4A8Stage {
  WeightStage weight;
  uint8_t levels[ColTiles * mma::kCols][kStepInputs + kLevelPad];
  w4a8::RowNumbers numbers[ColTiles * mma::kCols][w4::kPhases];
};

template <int ColTiles>
struct W4A8Shared {
  using Stage = W4A8Stage<ColTiles>;
  static constexpr int kStages = stages_beside<Stage, ColTiles>(16);
  static_assert(sizeof(Stage) % 16 == 0);

  Stage stages[kStages];
  bool last;
};

template <int ColTiles>
struct W4A8Tile : WeightTile {
  using Shared = W4A8Shared<ColTiles>;
  using Stage = W4A8Stage<ColTiles>;
  static constexpr int kStages = Shared::kStages;
  static constexpr int kAhead = 0;

  const QuantizedRows& x;
  Shared& shared;

  __device__ __forceinline__ W4A8Tile(const W4A8LinearParams& params, Shared& shared)
      : WeightTile(params.linear), x(params.x), shared(shared) {}

  __device__ __forceinline__ Stage& stage(int step) const { return shared.stages[step % kStages]; }

  __device__ __forceinline__ void begin_copies(int step) {
    if (step < steps) {
      copy_weight(stage(step).weight, step);
      move_x<false>(step);
    }
    close_copies();
  }

  __device__ __forceinline__ void begin_weight(int step) {
    if (step < steps) copy_weight(stage(step).weight, step);
    close_copies();
  }

  __device__ __forceinline__ void fetch_x(int step) {
    if (step < steps) move_x<true>(step);
  }

  // 16 threads move a row's levels of both groups, one its numbers; rows that do not exist are zero.
  template <bool Now>
  __device__ __forceinline__ void move_x(int step) {
    constexpr int kRows = ColTiles * mma::kCols, kPieces = kStepInputs / 16;
    constexpr int kTurns = (kRows * kPieces + kTileThreads - 1) / kTileThreads;
    static_assert(sizeof(w4a8::RowNumbers) * w4::kPhases == 16 && kRows <= kTileThreads);
    const int group = first_group + step * w4::kPhases;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int row = (turn * kTileThreads + static_cast<int>(threadIdx.x)) / kPieces;
      const int piece = threadIdx.x % kPieces * 16;
      if (kRows * kPieces >= kTileThreads || row < kRows)
        move_16<Now>(&stage(step).levels[row][piece], x.levels + at(row, group) * w4::kGroup + piece,
                     row < rows);
    }
    const int row = threadIdx.x;
    if (row < kRows) move_16<Now>(stage(step).numbers[row], x.numbers + at(row, group), row < rows);
  }

  // Index of a row's group; of the first row for those that do not exist.
  __device__ __forceinline__ int64_t at(int row, int group) const {
    return int64_t{first_row + (row < rows ? row : 0)} * x.groups + group;
  }

  // Nothing: sums of x come with its levels.
  __device__ __forceinline__ void prepare(int) {}

  // total += this phase's group.
  __device__ __forceinline__ void multiply(int step, Sums<ColTiles>& total) {
    const Stage& stage = this->stage(step);
    int c[w4::kProducts][ColTiles][4] = {};
    const uint8_t* row = &stage.levels[mma::address_row(lane)][phase * w4::kGroup];
#pragma unroll
    for (int jb = 0; jb < w4::kWordSteps; jb += 2) {
      mma::FragmentA a[2][w4::kProducts];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t words[w4::kLaneRows];
        lane_words(stage.weight, jb + s, words);
#pragma unroll
        for (int p = 0; p < w4::kProducts; ++p) a[s][p] = w4a8::weight_fragment(words, p);
      }
#pragma unroll
      for (int n = 0; n < ColTiles; ++n) {
        uint32_t loaded[4];
        mma::load_matrices(loaded, row + n * (mma::kCols * (kStepInputs + kLevelPad)) +
                                       w4a8::matrix_byte(mma::address_matrix(lane), jb));
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const mma::FragmentB b = w4a8::input_fragment(loaded, s);
#pragma unroll
          for (int p = 0; p < w4::kProducts; ++p) mma::multiply_add_int8(c[p][n], a[s][p], b);
        }
      }
    }
    float scale[w4::kLaneRows], zero[w4::kLaneRows];
    lane_numbers(stage.weight, 0, scale);
    lane_numbers(stage.weight, 1, zero);
#pragma unroll
    for (int n = 0; n < ColTiles; ++n) {
      w4a8::RowNumbers numbers[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) numbers[e] = stage.numbers[n * mma::kCols + mma::c_col(lane, e)][phase];
#pragma unroll
      for (int p = 0; p < w4::kProducts; ++p) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int out = w4::output_row(p, r);
          total[p][n][r] = w4a8::fold(total[p][n][r], c[p][n][r], numbers[r % 2], scale[out], zero[out]);
        }
      }
    }
  }
};

}  // namespace sglang_er::cuda
