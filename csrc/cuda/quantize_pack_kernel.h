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

// A lane's four runs of 8 neighbours, of which the first count[quarter] exist. All loads come before the
// first use.
template <class T, int Group>
__device__ __forceinline__ void load_runs(const T* from, const int (&count)[4], bool aligned,
                                          float (&x)[4][quantize::kRun]) {
  constexpr int kLoads = quantize::kRun * sizeof(T) / 16;
  if (aligned && count[3] == quantize::kRun) {  // then all of them are whole
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
      const T* run = from + quantize::run_input<Group>(0, quarter);
#pragma unroll
      for (int i = 0; i < quantize::kRun; ++i) x[quarter][i] = i < count[quarter] ? to_float(run[i]) : 0.0f;
    }
  }
}

// Of a group's rows, the code of the range that loses least; all lanes of the warp take part.
template <int Group>
__device__ __forceinline__ GroupCode clipped(const float (&x)[4][quantize::kRun], const int (&count)[4],
                                             float lo, float hi, const GroupCode& whole) {
  clip::Search search = clip::begin(lo, hi, whole);
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
  const int64_t groups = params.shape.groups();
  const int64_t item = int64_t{blockIdx.x} * kPackWarps + threadIdx.x / 32;
  if (item >= params.shape.row_blocks() * groups) return;
  const int64_t block = item / groups, group = item % groups;
  uint8_t* packed = params.packed + item * params.shape.group_bytes();
  uint16_t* scales_zeros = params.scales_zeros + item * (2 * kRowBlock);

#pragma unroll
  for (int pass = 0; pass < Lanes::kPasses; ++pass) {
    const int block_row = pass * Lanes::kRows + quantize::lane_row<Group>(lane);
    const int64_t row = block * kRowBlock + block_row;
    const bool exists = row < params.shape.rows;
    const int64_t first = group * Group + quantize::run_input<Group>(quantize::lane_part<Group>(lane), 0);
    const T* weight = static_cast<const T*>(params.weight) + (exists ? row : 0) * params.stride + first;
    float x[4][quantize::kRun];
    int count[4];
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t left = exists ? params.shape.cols - first - quantize::run_input<Group>(0, quarter) : 0;
      count[quarter] = static_cast<int>(left < 0 ? 0 : left < quantize::kRun ? left : quantize::kRun);
    }
    load_runs<T, Group>(weight, count, params.aligned, x);

    // fminf takes -0 for less than +0, as the rule of a group of zeros wants.
    float lo = INFINITY, hi = -INFINITY;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll
      for (int i = 0; i < quantize::kRun; ++i) {
        if (i >= count[quarter]) continue;
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
      const GroupCode best = clipped<Group>(x, count, lo, hi, code);
      if (exists) code = best;
    }
    if (quantize::lane_part<Group>(lane) == 0) {
      scales_zeros[block_row] = code.scale_bits;
      scales_zeros[kRowBlock + block_row] = code.zero_bits;
    }

    uint32_t words[quantize::kLaneWords];
#pragma unroll
    for (int which = 0; which < quantize::kLaneWords; ++which)
      words[which] = quantize::lane_word(x, count, which, code);
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
