// A block's part of x in w4a16_linear, and its products. w4a16_linear.cu says who computes what.
#pragma once

#include "w4_linear_tile.h"

namespace sglang_er::cuda {

inline constexpr int kInputPad =
    8;  // elements: rows of x begin 4 banks apart, so that ldmatrix has no conflicts

struct W4A16LinearParams {
  W4LinearParams linear;
  const uint16_t* x;
  int64_t x_stride;
  bool x_aligned;  // rows begin at multiples of 16 bytes
};

template <int ColTiles>
struct W4A16Stage {
  WeightStage weight;
  uint16_t x[ColTiles * mma::kCols][kStepInputs + kInputPad];
};

template <int ColTiles>
struct W4A16Shared {
  using Stage = W4A16Stage<ColTiles>;
  static constexpr int kSumBytes = 2 * ColTiles * mma::kCols * w4::kPhases * 4;
  static constexpr int kStages = stages_beside<Stage, ColTiles>(kSumBytes + 16);
  static_assert(sizeof(Stage) % 16 == 0);

  Stage stages[kStages];
  float sums[2][w4::kPhases][ColTiles * mma::kCols];  // of x, of this step and the next
  bool last;
};

template <bool IsHalf, int ColTiles>
struct W4A16Tile : WeightTile {
  using Shared = W4A16Shared<ColTiles>;
  using Stage = W4A16Stage<ColTiles>;
  static constexpr int kStages = Shared::kStages;
  static constexpr int kAhead = 1;  // the next step's x is summed while this one's is multiplied

  const W4A16LinearParams& params16;
  Shared& shared;
  const uint16_t* next_x;  // of row `warp`
  int next_inputs;         // that rows have from there on; none if that is below 1

  __device__ __forceinline__ W4A16Tile(const W4A16LinearParams& params, Shared& shared)
      : WeightTile(params.linear), params16(params), shared(shared) {
    const int64_t input = first_group * int64_t{w4::kGroup} + lane * 8;
    next_x = params.x + (first_row + warp) * params.x_stride + input;
    next_inputs = static_cast<int>(params.linear.shape.cols - input);
  }

  // A warp copies a row's inputs of both groups; rows and inputs that do not exist are zero.
  __device__ __forceinline__ void copy_x(Stage& stage) {
    const int inputs = max(0, min(8, next_inputs));
#pragma unroll
    for (int n = 0; n < ColTiles; ++n) {
      const int row = n * mma::kCols + warp;
      const int count = row < rows ? inputs : 0;
      uint16_t* to = &stage.x[row][lane * 8];
      const uint16_t* from = count > 0 ? next_x + n * mma::kCols * params16.x_stride : params16.x;
      if (params16.x_aligned) {
        copy_16(to, from, count * 2);
      } else {
        load_x(to, from, count);
      }
    }
    next_x += kStepInputs;
    next_inputs -= kStepInputs;
  }

  __device__ __forceinline__ static void load_x(uint16_t* to, const uint16_t* from, int count) {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) to[i] = i < count ? from[i] : uint16_t{0};
  }

  __device__ __forceinline__ void fetch_x(Stage (&stages)[kStages]) {
    constexpr int kSteps = kStages - 1;
    if (params16.x_aligned && params.shape.cols % 8 == 0) {  // then all 8 inputs exist or none
      uint4 loaded[kSteps][ColTiles];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const bool exist = step < steps && next_inputs - step * kStepInputs >= 8;
#pragma unroll
        for (int n = 0; n < ColTiles; ++n) {
          const uint16_t* from = next_x + n * mma::kCols * params16.x_stride + step * kStepInputs;
          loaded[step][n] = uint4{};
          if (exist && n * mma::kCols + warp < rows) loaded[step][n] = *reinterpret_cast<const uint4*>(from);
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int n = 0; n < ColTiles; ++n)
          *reinterpret_cast<uint4*>(&stages[step].x[n * mma::kCols + warp][lane * 8]) = loaded[step][n];
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < kSteps; ++step) {
        const int inputs = step < steps ? max(0, min(8, next_inputs - step * kStepInputs)) : 0;
#pragma unroll 1
        for (int n = 0; n < ColTiles; ++n) {
          const int row = n * mma::kCols + warp;
          load_x(&stages[step].x[row][lane * 8],
                 next_x + n * mma::kCols * params16.x_stride + step * kStepInputs, row < rows ? inputs : 0);
        }
      }
    }
    next_x += kSteps * kStepInputs;
    next_inputs -= kSteps * kStepInputs;
  }

  // All threads share the sums of a step's x: 16 / ColTiles lanes for a row and group.
  __device__ __forceinline__ void prepare(const Stage& stage, int step) {
    static_assert(kTileThreads == mma::kCols * w4::kPhases * w4::kPieces);
    constexpr int kSharing = w4::kPieces / ColTiles;
    const int sum = threadIdx.x / kSharing, sharer = threadIdx.x % kSharing;
    const int row = sum / w4::kPhases, of_phase = sum % w4::kPhases;
    float pieces[ColTiles];
#pragma unroll
    for (int i = 0; i < ColTiles; ++i) {
      const int piece = sharer + i * kSharing;
      const auto four = *reinterpret_cast<const uint4*>(&stage.x[row][of_phase * w4::kGroup + piece * 8]);
      const uint32_t words[4] = {four.x, four.y, four.z, four.w};
      pieces[i] = w4::piece_sum<IsHalf>(words);
    }
    float total = w4::lane_sum(pieces);
#pragma unroll
    for (int apart = kSharing / 2; apart > 0; apart /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, apart);
    if (sharer == 0) shared.sums[step % 2][of_phase][row] = total;
  }

  // total += this phase's group.
  __device__ __forceinline__ void multiply(const Stage& stage, int step, Sums<ColTiles>& total) {
    Sums<ColTiles> c = {};
    const uint16_t* row = &stage.x[mma::address_row(lane)][phase * w4::kGroup];
#pragma unroll
    for (int jb = 0; jb < w4::kWordSteps; ++jb) {
      uint32_t words[w4::kLaneRows];
      lane_words(stage.weight, jb, words);
      mma::FragmentA a[w4::kProducts][w4::kSteps];
#pragma unroll
      for (int p = 0; p < w4::kProducts; ++p) {
#pragma unroll
        for (int s = 0; s < w4::kSteps; ++s) a[p][s] = w4::weight_fragment<IsHalf>(words, p, s);
      }
#pragma unroll
      for (int n = 0; n < ColTiles; ++n) {
        uint32_t loaded[4];
        mma::load_matrices(loaded, row + n * (mma::kCols * (kStepInputs + kInputPad)) +
                                       w4::matrix_input(mma::address_matrix(lane), jb));
#pragma unroll
        for (int s = 0; s < w4::kSteps; ++s) {
          const mma::FragmentB b = w4::input_fragment(loaded, s);
#pragma unroll
          for (int p = 0; p < w4::kProducts; ++p) mma::multiply_add<IsHalf>(c[p][n], a[p][s], b);
        }
      }
    }
    float scale[w4::kLaneRows], zero[w4::kLaneRows];
    lane_numbers(stage.weight, 0, scale);
    lane_numbers(stage.weight, 1, zero);
#pragma unroll
    for (int n = 0; n < ColTiles; ++n) {
      const float2 sums = *reinterpret_cast<const float2*>(
          &shared.sums[step % 2][phase][n * mma::kCols + mma::c_col(lane, 0)]);
#pragma unroll
      for (int p = 0; p < w4::kProducts; ++p) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int out = w4::output_row(p, r);
          total[p][n][r] =
              w4::fold(total[p][n][r], c[p][n][r], r % 2 == 0 ? sums.x : sums.y, scale[out], zero[out]);
        }
      }
    }
  }
};

}  // namespace sglang_er::cuda
