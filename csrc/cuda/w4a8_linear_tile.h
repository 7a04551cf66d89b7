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
  const uint8_t* next_levels;            // of row level_row, this thread's 16 of both groups
  const w4a8::RowNumbers* next_numbers;  // of row threadIdx.x
  int level_row;

  static constexpr int kRows = ColTiles * mma::kCols, kPieces = kStepInputs / 16;
  static constexpr int kTurnRows = kTileThreads / kPieces;  // whose levels all threads move at a time

  __device__ __forceinline__ explicit W4A8Tile(const W4A8LinearParams& params)
      : WeightTile(params.linear), x(params.x) {
    const int thread = static_cast<int>(threadIdx.x);
    level_row = thread / kPieces;
    next_levels = x.levels + (int64_t{first_row + level_row} * x.groups + first_group) * w4::kGroup +
                  thread % kPieces * 16;
    next_numbers = x.numbers + int64_t{first_row + thread} * x.groups + first_group;
  }

  static constexpr int kTurns = (kRows + kTurnRows - 1) / kTurnRows;
  static_assert(sizeof(w4a8::RowNumbers) * w4::kPhases == 16 && kRows <= kTileThreads);

  // What this thread moves, and whether it exists: rows that do not are zero, and nothing is read of them.
  __device__ __forceinline__ bool moves_levels(int turn) const {
    return kRows >= kTurnRows || turn * kTurnRows + level_row < kRows;
  }
  __device__ __forceinline__ bool has_levels(int turn) const { return turn * kTurnRows + level_row < rows; }
  __device__ __forceinline__ const uint8_t* levels_of(int turn) const {
    return next_levels + int64_t{turn * kTurnRows} * x.groups * w4::kGroup;
  }
  __device__ __forceinline__ uint8_t* place_of(Stage& stage, int turn) const {
    return &stage.levels[turn * kTurnRows + level_row][threadIdx.x % kPieces * 16];
  }
  __device__ __forceinline__ bool moves_numbers() const { return static_cast<int>(threadIdx.x) < kRows; }
  __device__ __forceinline__ bool has_numbers() const { return static_cast<int>(threadIdx.x) < rows; }

  __device__ __forceinline__ void copy_x(Stage& stage) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const bool exist = has_levels(turn);
      if (moves_levels(turn))
        copy_16(place_of(stage, turn), exist ? levels_of(turn) : x.levels, exist ? 16 : 0);
    }
    const bool exist = has_numbers();
    if (moves_numbers())
      copy_16(stage.numbers[threadIdx.x], exist ? next_numbers : x.numbers, exist ? 16 : 0);
    next_levels += kStepInputs;
    next_numbers += w4::kPhases;
  }

  __device__ __forceinline__ void fetch_x(Stage (&stages)[kStages]) {
    constexpr int kSteps = kStages - 1;
    uint4 levels[kSteps][kTurns], numbers[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        levels[step][turn] = uint4{};
        if (step < steps && has_levels(turn))
          levels[step][turn] = *reinterpret_cast<const uint4*>(levels_of(turn) + step * kStepInputs);
      }
      numbers[step] = uint4{};
      if (step < steps && has_numbers())
        numbers[step] = *reinterpret_cast<const uint4*>(next_numbers + step * w4::kPhases);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        if (moves_levels(turn)) *reinterpret_cast<uint4*>(place_of(stages[step], turn)) = levels[step][turn];
      }
      if (moves_numbers()) *reinterpret_cast<uint4*>(stages[step].numbers[threadIdx.x]) = numbers[step];
    }
    next_levels += kSteps * kStepInputs;
    next_numbers += kSteps * w4::kPhases;
  }

  // Nothing: sums of x come with its levels.
  __device__ __forceinline__ void prepare(const Stage&, int) {}

  // total += this phase's group.
  __device__ __forceinline__ void multiply(const Stage& stage, int, Sums<ColTiles>& total) {
    int c[w4::kProducts][ColTiles][4];
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
          for (int p = 0; p < w4::kProducts; ++p) {
            if (jb + s == 0) {
              mma::multiply_int8(c[p][n], a[s][p], b, w4a8::kStart);
            } else {
              mma::multiply_add_int8(c[p][n], a[s][p], b);
            }
          }
        }
      }
    }
    float scale[w4::kLaneRows], zero[w4::kLaneRows], offset[w4::kLaneRows];
    lane_numbers(stage.weight, 0, scale);
    lane_numbers(stage.weight, 1, zero);
#pragma unroll
    for (int i = 0; i < w4::kLaneRows; ++i) offset[i] = w4a8::fold_offset(scale[i]);
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
          total[p][n][r] =
              w4a8::fold(total[p][n][r], c[p][n][r], numbers[r % 2], scale[out], offset[out], zero[out]);
        }
      }
    }
  }
};

}  // namespace sglang_er::cuda
