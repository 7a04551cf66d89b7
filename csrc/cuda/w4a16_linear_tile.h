// What a block of w4a16_linear works on, and its steps: copies, sums of x, products. w4a16_linear.cu says who
// computes what.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "async_copy.h"
#include "sglang_er/mma.h"
#include "sglang_er/packed_weight.h"
#include "sglang_er/w4_fragment.h"

namespace sglang_er::cuda {

// Set by the build: shared memory that all blocks of a multiprocessor may use together.
#if !defined(SGLANG_ER_SHARED_KB)
#error "SGLANG_ER_SHARED_KB is not defined"
#endif

inline constexpr int kTileThreads = w4::kRowPairs * w4::kPhases * mma::kLanes;
inline constexpr int kPhaseThreads = w4::kRowPairs * mma::kLanes;
inline constexpr int kStepInputs = w4::kPhases * w4::kGroup;
inline constexpr int kInputPad =
    8;  // elements: rows of x begin 4 banks apart, so that ldmatrix has no conflicts

struct W4LinearParams {
  const uint16_t* x;
  int64_t x_stride;
  bool x_aligned;  // rows begin at multiples of 16 bytes
  int m;
  const uint8_t* packed;
  const uint16_t* scales_zeros;
  PackedShape shape;
  w4::Schedule schedule;
  const void* bias;  // or null
  bool bias_is_float;
  uint16_t* out;
  int64_t out_stride;
  bool out_aligned;    // rows begin at multiples of 8 bytes
  float4* partials;    // [tiles][splits][fragments][kPhaseThreads]
  uint32_t* counters;  // [tiles], zero between launches
};

// What one step of a block needs: a group of each phase. A thread's words are those that it copied itself.
template <int ColTiles>
struct Stage {
  uint4 words[w4::kWordSteps][kTileThreads];
  uint16_t scales_zeros[w4::kRowPairs * w4::kPhases][2][2][kRowBlock];  // warp, block, scale or zero
  uint16_t x[ColTiles * mma::kCols][kStepInputs + kInputPad];
};

template <int ColTiles>
inline constexpr int kBlocksPerMultiprocessor = ColTiles <= 2 ? 2 : 1;

template <int ColTiles>
struct Shared {
  // A block also costs 1 KB by itself.
  static constexpr int kBytes = SGLANG_ER_SHARED_KB * 1024 / kBlocksPerMultiprocessor<ColTiles> - 1024;
  static constexpr int kSumBytes = 2 * ColTiles * mma::kCols * w4::kPhases * 4;
  static constexpr int kFit = (kBytes - kSumBytes - 16) / static_cast<int>(sizeof(Stage<ColTiles>));
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static_assert(kStages >= 3, "one stage in use, one whose x is summed, one under way");
  static_assert(sizeof(Stage<ColTiles>) % 16 == 0);

  Stage<ColTiles> stages[kStages];
  float sums[2][w4::kPhases][ColTiles * mma::kCols];  // of x, of this step and the next
  bool last;
};

template <int ColTiles>
using Sums = float[w4::kProducts][ColTiles][4];

template <bool IsHalf, int ColTiles>
struct TileWork {
  const W4LinearParams& params;
  Shared<ColTiles>& shared;
  int lane, warp, row_pair, phase;
  int64_t first_block;  // of 16 rows, of this warp
  int first_group, end_group, steps;

  __device__ __forceinline__ TileWork(const W4LinearParams& params, Shared<ColTiles>& shared)
      : params(params), shared(shared) {
    lane = threadIdx.x % mma::kLanes;
    warp = threadIdx.x / mma::kLanes;
    row_pair = warp % w4::kRowPairs;
    phase = warp / w4::kRowPairs;
    first_block = (int64_t{blockIdx.x} * w4::kRowPairs + row_pair) * 2;
    first_group = blockIdx.y * params.schedule.split_groups;
    end_group = min(first_group + params.schedule.split_groups, static_cast<int>(params.shape.groups()));
    steps = (end_group - first_group + w4::kPhases - 1) / w4::kPhases;
  }

  __device__ __forceinline__ int group(int step) const { return first_group + step * w4::kPhases + phase; }

  // A tile beyond the last block of rows reads that one again; its results are not stored.
  __device__ __forceinline__ int64_t block_of(int which) const {
    const int64_t last = params.shape.row_blocks() - 1, block = first_block + which;
    return block < last ? block : last;
  }

  // Begins the copies of a step; a group of copies is closed even if there is none, for the count.
  __device__ __forceinline__ void begin_copies(int step) {
    if (step < steps) {
      Stage<ColTiles>& stage = shared.stages[step % Shared<ColTiles>::kStages];
      if (group(step) < end_group) copy_weight(stage, group(step));
      copy_x(stage, (first_group + step * w4::kPhases) * w4::kGroup);
    }
    close_copies();
  }

  __device__ __forceinline__ void copy_weight(Stage<ColTiles>& stage, int group) {
    const uint8_t* words =
        params.packed + (block_of(w4::lane_block(lane)) * params.shape.groups() + group) * w4::kGroupBytes +
        w4::lane_byte(lane);
#pragma unroll
    for (int jb = 0; jb < w4::kWordSteps; ++jb)
      copy_16(&stage.words[jb][threadIdx.x], words + jb * w4::kWordStepBytes);
    constexpr int kLanesPerBlock = 2 * kRowBlock * 2 / 16;
    if (lane < 2 * kLanesPerBlock) {
      const int which = lane / kLanesPerBlock, piece = lane % kLanesPerBlock * 8;
      copy_16(
          &stage.scales_zeros[warp][which][0][0] + piece,
          params.scales_zeros + (block_of(which) * params.shape.groups() + group) * (2 * kRowBlock) + piece);
    }
  }

  // A warp copies a row's inputs of both groups; rows and inputs that do not exist are zero.
  __device__ __forceinline__ void copy_x(Stage<ColTiles>& stage, int first_input) {
    const int64_t input = first_input + lane * 8;
    const int inputs = static_cast<int>(max(int64_t{0}, min(int64_t{8}, params.shape.cols - input)));
#pragma unroll
    for (int n = 0; n < ColTiles; ++n) {
      const int row = n * mma::kCols + warp;
      const int count = row < params.m ? inputs : 0;
      uint16_t* to = &stage.x[row][lane * 8];
      const uint16_t* from = count > 0 ? params.x + row * params.x_stride + input : params.x;
      if (params.x_aligned) {
        copy_16(to, from, count * 2);
      } else {
        for (int i = 0; i < 8; ++i) to[i] = i < count ? from[i] : uint16_t{0};
      }
    }
  }

  // All threads share the sums of a step's x: 16 / ColTiles lanes for a row and group.
  __device__ __forceinline__ void sum_x(int step) {
    static_assert(kTileThreads == mma::kCols * w4::kPhases * w4::kPieces);
    constexpr int kSharing = w4::kPieces / ColTiles;
    const Stage<ColTiles>& stage = shared.stages[step % Shared<ColTiles>::kStages];
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
  __device__ __forceinline__ void multiply(int step, Sums<ColTiles>& total) {
    const Stage<ColTiles>& stage = shared.stages[step % Shared<ColTiles>::kStages];
    Sums<ColTiles> c = {};
    const uint16_t* row = &stage.x[mma::address_row(lane)][phase * w4::kGroup];
#pragma unroll
    for (int jb = 0; jb < w4::kWordSteps; ++jb) {
      const uint4 four = stage.words[jb][threadIdx.x];
      const uint32_t words[w4::kLaneRows] = {four.x, four.y, four.z, four.w};
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
    lane_numbers(stage, 0, scale);
    lane_numbers(stage, 1, zero);
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

  // Scales (0) or zeros (1) of the lane's four rows.
  __device__ __forceinline__ void lane_numbers(const Stage<ColTiles>& stage, int which,
                                               float (&numbers)[w4::kLaneRows]) const {
    const auto pairs = *reinterpret_cast<const uint2*>(
        &stage.scales_zeros[warp][w4::lane_block(lane)][which][w4::lane_first_row(lane)]);
    numbers[0] = bf16_to_float(static_cast<uint16_t>(pairs.x));
    numbers[1] = bf16_to_float(static_cast<uint16_t>(pairs.x >> 16));
    numbers[2] = bf16_to_float(static_cast<uint16_t>(pairs.y));
    numbers[3] = bf16_to_float(static_cast<uint16_t>(pairs.y >> 16));
  }
};

}  // namespace sglang_er::cuda
