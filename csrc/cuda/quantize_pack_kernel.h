// The kernel of quantize_pack.cu, which says who computes what.
#pragma once

#include "elements.h"
#include "sglang_er/quantize_lane.h"

namespace sglang_er::cuda {

inline constexpr int kPackWarps = 4;

struct QuantizeParams {
  const void* weight;
  int64_t stride;
  bool aligned;  // rows begin at multiples of 16 bytes
  PackedShape shape;
  uint8_t* packed;
  uint16_t* scales_zeros;
};

// A lane's four runs of 8 neighbours, of inputs that `left` exist of from the lane's first one on; the others
// are NaN, which is neither the least nor the largest of anything and has the level 0: nothing else has to
// look. All loads come before the first use.
template <class T, int Group>
__device__ __forceinline__ void load_runs(const T* from, int left, bool aligned,
                                          float (&x)[4][quantize::kRun]) {
  constexpr int kLoads = quantize::kRun * sizeof(T) / 16;
  if (aligned && left >= quantize::run_input<Group>(0, 3) + quantize::kRun) {
    union {
      uint4 loads[4][kLoads];
      T values[4][quantize::kRun];
    } runs;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const auto* run = reinterpret_cast<const uint4*>(from + quantize::run_input<Group>(0, quarter));
#pragma unroll
      for (int i = 0; i < kLoads; ++i) runs.loads[quarter][i] = __ldcs(run + i);
    }
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll
      for (int i = 0; i < quantize::kRun; ++i) x[quarter][i] = to_float(runs.values[quarter][i]);
    }
  } else {
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int first = quantize::run_input<Group>(0, quarter);
#pragma unroll
      for (int i = 0; i < quantize::kRun; ++i)
        x[quarter][i] = first + i < left ? to_float(from[first + i]) : NAN;
    }
  }
}

// Of a group's rows, the code of the range that loses least; all lanes of the warp take part.
template <int Group>
__device__ __forceinline__ GroupCode clipped(const float (&x)[4][quantize::kRun], int left, float lo,
                                             float hi, const GroupCode& whole) {
  clip::Search search = clip::begin(lo, hi, whole);
  int count[4];  // of a run, that exist
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter)
    count[quarter] = max(0, min(quantize::kRun, left - quantize::run_input<Group>(0, quarter)));
  int units[4][quantize::kRun];
  quantize::lane_units(x, whole, units);
#pragma unroll 1  // eight times the code would not fit the instruction cache
  for (int i = 0; i < clip::kCandidates; ++i) {
    const clip::Candidate candidate = clip::candidate(search, i);
    uint32_t squares = quantize::lane_squares(units, count, candidate);
#pragma unroll
    for (int apart = quantize::Lanes<Group>::kPerRow / 2; apart > 0; apart /= 2)
      squares += __shfl_xor_sync(0xFFFFFFFFu, squares, apart);
    clip::compare(search, i, candidate, squares);
  }
  return search.best;
}

template <class T, int Group, bool ClipSearch>
__global__ void __launch_bounds__(kPackWarps * 32)
    quantize_pack_kernel(const __grid_constant__ QuantizeParams params) {
  using Lanes = quantize::Lanes<Group>;
  const int lane = threadIdx.x % 32;
  const int groups = static_cast<int>(params.shape.groups());
  const int item = static_cast<int>(blockIdx.x * kPackWarps + threadIdx.x / 32);
  if (item >= static_cast<int>(params.shape.row_blocks()) * groups) return;
  const int64_t block = item / groups, group = item % groups;
  uint8_t* packed = params.packed + item * params.shape.group_bytes();
  uint16_t* scales_zeros = params.scales_zeros + int64_t{item} * (2 * kRowBlock);

#pragma unroll
  for (int pass = 0; pass < Lanes::kPasses; ++pass) {
    const int block_row = pass * Lanes::kRows + quantize::lane_row<Group>(lane);
    const int64_t row = block * kRowBlock + block_row;
    const bool exists = row < params.shape.rows;
    const int64_t first = group * Group + quantize::run_input<Group>(quantize::lane_part<Group>(lane), 0);
    const T* weight = static_cast<const T*>(params.weight) + (exists ? row : 0) * params.stride + first;
    const int left =
        exists ? static_cast<int>(max(int64_t{0}, min(int64_t{Group}, params.shape.cols - first))) : 0;
    float x[4][quantize::kRun];
    load_runs<T, Group>(weight, left, params.aligned, x);

    // fminf takes -0 for less than +0, as the rule of a group of zeros wants.
    float lo = INFINITY, hi = -INFINITY;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll
      for (int i = 0; i < quantize::kRun; ++i) {
        lo = fminf(lo, x[quarter][i]);
        hi = fmaxf(hi, x[quarter][i]);
      }
    }
#pragma unroll
    for (int apart = Lanes::kPerRow / 2; apart > 0; apart /= 2) {
      lo = fminf(lo, __shfl_xor_sync(0xFFFFFFFFu, lo, apart));
      hi = fmaxf(hi, __shfl_xor_sync(0xFFFFFFFFu, hi, apart));
    }
    GroupCode code = exists ? group_code(lo, hi) : GroupCode{};
    if constexpr (ClipSearch) {
      const GroupCode best = clipped<Group>(x, left, lo, hi, code);
      if (exists) code = best;
    }
    if (quantize::lane_part<Group>(lane) == 0) {
      scales_zeros[block_row] = code.scale_bits;
      scales_zeros[kRowBlock + block_row] = code.zero_bits;
    }

    uint32_t words[quantize::kLaneWords];
#pragma unroll
    for (int which = 0; which < quantize::kLaneWords; ++which)
      words[which] = quantize::lane_word(x, which, code);
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      const bool low = quantize::sent_word<Group>(lane, turn, 0) == 0;  // else the upper of each pair goes
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        // Both candidates by constant index: an index known at run time would move the array to memory.
        uint32_t& lower = words[turn == 0 ? 2 * which : which];
        uint32_t& upper = words[turn == 0 ? 2 * which + 1 : which + 2];
        const uint32_t come =
            __shfl_sync(0xFFFFFFFFu, low ? lower : upper, quantize::partner<Group>(lane, turn));
        (low ? lower : upper) = come;
      }
    }
    *reinterpret_cast<uint4*>(packed + quantize::store_byte<Group>(lane, pass)) = {words[0], words[1],
                                                                                   words[2], words[3]};
  }
}

}  // namespace sglang_er::cuda
