// What a block of w4a16_linear or w4a8_linear works on, and its part of the weight. The files of the two ops
// say who computes what.
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
inline constexpr int kMostRows = 64;  // of x, in a block

// All but x.
struct W4LinearParams {
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
  float4* partials;    // [tiles][chunks][splits][fragments][kPhaseThreads]
  uint32_t* counters;  // [tiles][chunks], zero between launches
};

template <int ColTiles>
inline constexpr int kBlocksPerMultiprocessor = ColTiles <= 2 ? 2 : 1;

// Shared memory of a block, which costs 1 KB more by itself.
template <int ColTiles>
inline constexpr int kBlockBytes = SGLANG_ER_SHARED_KB * 1024 / kBlocksPerMultiprocessor<ColTiles> - 1024;

// How many stages fit beside `other` bytes.
template <class Stage, int ColTiles>
constexpr int stages_beside(int other) {
  const int fit = (kBlockBytes<ColTiles> - other) / static_cast<int>(sizeof(Stage));
  return fit < 6 ? fit : 6;
}

template <int ColTiles>
using Sums = float[w4::kProducts][ColTiles][4];

// A step's weights: a group of each phase. A thread's words are those that it copied itself.
struct WeightStage {
  uint4 words[w4::kWordSteps][kTileThreads];
  uint16_t scales_zeros[w4::kRowPairs * w4::kPhases][2][2][kRowBlock];  // warp, block, scale or zero
};

// Copies go step by step; what they read next is kept as pointers, as an index costs several instructions,
// and there are not many to spare: at few rows a multiprocessor has some 900 cycles for the weights of a
// step.
struct WeightTile {
  const W4LinearParams& params;
  int lane, warp, row_pair, phase;
  int first_row, rows;  // of x
  int64_t first_block;  // of 16 rows of the weight, of this warp
  int first_group, end_group, steps;
  int next_group;  // of this thread's phase
  const uint8_t* next_words;
  const uint16_t* next_scales_zeros;

  __device__ __forceinline__ explicit WeightTile(const W4LinearParams& params) : params(params) {
    lane = threadIdx.x % mma::kLanes;
    warp = threadIdx.x / mma::kLanes;
    row_pair = warp % w4::kRowPairs;
    phase = warp / w4::kRowPairs;
    first_row = static_cast<int>(blockIdx.x) * kMostRows;
    rows = min(kMostRows, params.m - first_row);
    first_block = (int64_t{blockIdx.y} * w4::kRowPairs + row_pair) * 2;
    first_group = blockIdx.z * params.schedule.split_groups;
    end_group = min(first_group + params.schedule.split_groups, static_cast<int>(params.shape.groups()));
    steps = (end_group - first_group + w4::kPhases - 1) / w4::kPhases;
    next_group = first_group + phase;
    const int64_t groups = params.shape.groups();
    next_words = params.packed + (block_of(w4::lane_block(lane)) * groups + next_group) * w4::kGroupBytes +
                 w4::lane_byte(lane);
    next_scales_zeros = params.scales_zeros +
                        (block_of(lane / kScaleLanes) * groups + next_group) * (2 * kRowBlock) +
                        lane % kScaleLanes * 8;
  }

  static constexpr int kScaleLanes = 2 * kRowBlock * 2 / 16;  // that copy a block's numbers, 16 bytes each

  // Whether this thread's phase has a group in the step.
  __device__ __forceinline__ bool has_group(int step) const {
    return first_group + step * w4::kPhases + phase < end_group;
  }

  // A tile beyond the last block of rows reads that one again; its results are not stored.
  __device__ __forceinline__ int64_t block_of(int which) const {
    const int64_t last = params.shape.row_blocks() - 1, block = first_block + which;
    return block < last ? block : last;
  }

  // The next step's.
  __device__ __forceinline__ void copy_weight(WeightStage& stage) {
    if (next_group < end_group) {
#pragma unroll
      for (int jb = 0; jb < w4::kWordSteps; ++jb)
        copy_16(&stage.words[jb][threadIdx.x], next_words + jb * w4::kWordStepBytes);
      if (lane < 2 * kScaleLanes) copy_16(&stage.scales_zeros[warp][0][0][0] + lane * 8, next_scales_zeros);
    }
    next_group += w4::kPhases;
    next_words += w4::kPhases * w4::kGroupBytes;
    next_scales_zeros += w4::kPhases * (2 * kRowBlock);
  }

  // The lane's words of a word step, one a row.
  __device__ __forceinline__ void lane_words(const WeightStage& stage, int jb,
                                             uint32_t (&words)[w4::kLaneRows]) const {
    const uint4 four = stage.words[jb][threadIdx.x];
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  }

  // Scales (0) or zeros (1) of the lane's four rows.
  __device__ __forceinline__ void lane_numbers(const WeightStage& stage, int which,
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
