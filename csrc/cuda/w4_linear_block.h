// The steps of a block of w4a16_linear or w4a8_linear, and how sums of phases and splits become outputs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "dependent_launch.h"
#include "w4_linear_tile.h"

namespace sglang_er::cuda {

template <bool IsHalf>
__device__ __forceinline__ uint16_t output_bits(float value) {
  if constexpr (IsHalf) return __half_as_ushort(__float2half_rn(value));
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// A lane's four outputs follow each other, for two rows of x in every tile of 8.
template <bool IsHalf, int ColTiles>
__device__ __forceinline__ void store_out(const WeightTile& tile, const Sums<ColTiles>& total) {
  const W4LinearParams& params = tile.params;
  const int lane = tile.lane;
  const int64_t output = (tile.first_block + w4::lane_block(lane)) * kRowBlock + w4::lane_first_row(lane);
  const int outputs =
      static_cast<int>(max(int64_t{0}, min(int64_t{w4::kLaneRows}, params.shape.rows - output)));
  float bias[w4::kLaneRows] = {};
  if (params.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < w4::kLaneRows; ++i) {
      if (i >= outputs) continue;
      bias[i] = params.bias_is_float
                    ? static_cast<const float*>(params.bias)[output + i]
                    : w4::input_value<IsHalf>(static_cast<const uint16_t*>(params.bias)[output + i]);
    }
  }
#pragma unroll
  for (int n = 0; n < ColTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = n * mma::kCols + mma::c_col(lane, e);
      if (row >= tile.rows) continue;
      uint16_t bits[w4::kLaneRows];
#pragma unroll
      for (int p = 0; p < w4::kProducts; ++p) {
#pragma unroll
        for (int r = e; r < 4; r += 2) {
          const int i = w4::output_row(p, r);
          bits[i] = output_bits<IsHalf>(total[p][n][r] + bias[i]);
        }
      }
      uint16_t* out = params.out + (tile.first_row + row) * params.out_stride + output;
      if (outputs == w4::kLaneRows && params.out_aligned) {
        *reinterpret_cast<uint2*>(out) = {bits[0] | uint32_t{bits[1]} << 16,
                                          bits[2] | uint32_t{bits[3]} << 16};
      } else {
#pragma unroll
        for (int i = 0; i < w4::kLaneRows; ++i) {
          if (i < outputs) out[i] = bits[i];
        }
      }
    }
  }
}

// `Tile`, a WeightTile with its part of x, says:
//
//   kStages, kAhead      stages in `shared`; steps beyond the one that is multiplied that have to be there
//   copy_weight, copy_x  begin copies of the next step's weight, and of its x
//   fetch_x              x of the first kStages - 1 steps, there once all threads have passed a barrier: all
//                        loads before the first store, so that they take one trip to memory
//   prepare              by all threads, on a step that all of them have, a barrier before it is multiplied
//   multiply             adds a group of this thread's phase to `total`
//
// `shared` begins with its stages and has a flag, `last`.
template <bool IsHalf, int ColTiles, class Tile>
__device__ __forceinline__ void compute_block(Tile& tile, typename Tile::Shared& shared) {
  constexpr int kStages = Tile::kStages, kFragments = w4::kProducts * ColTiles;
  static_assert(kStages >= 2 + Tile::kAhead, "one stage in use, one or more under way");
  const W4LinearParams& params = tile.params;
  const int steps = tile.steps;
  Sums<ColTiles> total = {};

  // The weight does not depend on the launches before this one; x does. A group of copies is closed even if
  // there is no step, for the count.
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) tile.copy_weight(shared.stages[step].weight);
    close_copies();
  }
  wait_for_previous();
  tile.fetch_x(shared.stages);
  if constexpr (Tile::kAhead > 0) {
    __syncthreads();
    tile.prepare(shared.stages[0], 0);
  }
  int used = 0, filled = kStages - 1;  // stages, in turn
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2 - Tile::kAhead>();
    __syncthreads();  // all have what the step needs, and nobody reads the previous step's any more
    if (step + kStages - 1 < steps) {
      tile.copy_weight(shared.stages[filled].weight);
      tile.copy_x(shared.stages[filled]);
    }
    close_copies();
    const int next = used + 1 == kStages ? 0 : used + 1;
    if (tile.has_group(step)) tile.multiply(shared.stages[used], step, total);
    if (Tile::kAhead > 0 && step + 1 < steps) tile.prepare(shared.stages[next], step + 1);
    used = next;
    filled = filled + 1 == kStages ? 0 : filled + 1;
  }
  wait_copies<0>();
  __syncthreads();

  // The phases' sums, then the splits', always in order.
  auto* others = reinterpret_cast<float4*>(shared.stages);
  const int thread = threadIdx.x % kPhaseThreads;
  static_assert(sizeof(shared.stages) >= kFragments * kPhaseThreads * sizeof(float4) && w4::kPhases == 2);
  if (tile.phase == 1) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const float (&own)[4] = total[f / ColTiles][f % ColTiles];
      others[f * kPhaseThreads + thread] = {own[0], own[1], own[2], own[3]};
    }
  }
  __syncthreads();
  const int splits = params.schedule.splits;
  const int64_t part = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;  // tile and chunk of rows
  float4* partials = params.partials + part * splits * (kFragments * kPhaseThreads) + thread;
  if (tile.phase == 0) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      float (&own)[4] = total[f / ColTiles][f % ColTiles];
      const float4 other = others[f * kPhaseThreads + thread];
      own[0] += other.x, own[1] += other.y, own[2] += other.z, own[3] += other.w;
      if (splits > 1)
        partials[(int64_t{blockIdx.z} * kFragments + f) * kPhaseThreads] = {own[0], own[1], own[2], own[3]};
    }
  }
  if (splits > 1) {
    __threadfence();
    __syncthreads();
    // Wraps to zero by itself, for the next launch.
    const auto last = static_cast<uint32_t>(splits - 1);
    if (threadIdx.x == 0) shared.last = atomicInc(params.counters + part, last) == last;
    __syncthreads();
    if (!shared.last || tile.phase != 0) return;
    __threadfence();
    // All fragments of some splits are under way at a time.
    [[maybe_unused]] constexpr int kSplitsAtOnce = ColTiles >= 4 ? 1 : 4 / ColTiles;
    Sums<ColTiles> sum = {};
#pragma unroll kSplitsAtOnce
    for (int split = 0; split < splits; ++split) {
      float4 next[kFragments];
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
        next[f] = __ldcg(partials + (int64_t{split} * kFragments + f) * kPhaseThreads);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        float (&of)[4] = sum[f / ColTiles][f % ColTiles];
        of[0] += next[f].x, of[1] += next[f].y, of[2] += next[f].z, of[3] += next[f].w;
      }
    }
    store_out<IsHalf, ColTiles>(tile, sum);
    return;
  }
  if (tile.phase == 0) store_out<IsHalf, ColTiles>(tile, total);
}

}  // namespace sglang_er::cuda
