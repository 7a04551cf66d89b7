// How a warp multiplies 32 rows of a packed weight (packed_weight.h, groups of 128) with x on m16n8k16
// products: every index and every bit trick of csrc/cuda/w4a16_linear, host and device.
//
// A is the weight, B is x, C has outputs along its rows and rows of x along its columns. The packed words are
// operands as they lie: word j of a row holds pairs (k, k + 1) for k = 32 i + 2 j, i = 0..3. Lane (g = lane /
// 4, t = lane % 4) takes words 4 jb + t; pairs i = 2 s and 2 s + 1 are its two register pairs of the product
// (jb, s). Inner indices are permuted by that, and x is read in the same order: for fixed i and jb the four
// lanes' pairs are 8 neighbours of x, which is one row of an 8 x 8 matrix of ldmatrix.
//
// Two blocks of 16 rows give 16-byte loads: g = 4 b + a takes rows 4 a .. 4 a + 3 of block b. Rows 4 a and 4
// a + 1 are rows g and g + 8 of product p = 0, the next two of p = 1.
//
// A level q becomes 16 + q in one shift and one bit operation, exactly. So with c = sum x (16 + q) of a
// group, sum x W = scale * c + (zero - 16 * scale) * sum x. The offset is as small as the mantissa allows, as
// c loses to rounding what the second term takes back.
#pragma once

#include <cstdint>

#include "sglang_er/bfloat16.h"
#include "sglang_er/bits.h"
#include "sglang_er/mma.h"
#include "sglang_er/packed_weight.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace sglang_er::w4 {

inline constexpr int kGroup = 128;
inline constexpr int kQuarter = kGroup / 4;
inline constexpr int kWordSteps = kGroup / kWeightsPerWord / 4;  // jb = 0..3
inline constexpr int kGroupBytes = kGroup / kWeightsPerWord * kWordBytes;
inline constexpr int kWordStepBytes = 4 * kWordBytes;
inline constexpr int kProducts = 2;  // p = 0..1: row pairs of a lane
inline constexpr int kSteps = 2;     // s = 0..1
inline constexpr int kWarpRows = 2 * kRowBlock;
inline constexpr int kLaneRows = 4;  // outputs of a lane
inline constexpr float kOffset = 16.0f;

// Rows of the weight that a lane works on: block 0 or 1 of the warp's two, and its first of four rows in
// there.
SGLANG_ER_INLINE int lane_block(int lane) { return lane / 16; }
SGLANG_ER_INLINE int lane_first_row(int lane) { return lane / 4 % 4 * kLaneRows; }

// Where the lane's 16 bytes of word step 0 begin in a group of its block; others follow kWordStepBytes apart.
SGLANG_ER_INLINE int lane_byte(int lane) { return lane % 4 * kWordBytes + lane_first_row(lane) * 4; }

// Pair i of a word as two numbers 16 + q of the type of x: bf16 has 7 bits of mantissa, so that q * 2^3 adds
// q to 16; fp16 has 10.
template <bool IsHalf>
SGLANG_ER_INLINE uint32_t pair_value(uint32_t word, int i) {
  constexpr int kPlace = IsHalf ? 6 : 3;
  constexpr uint32_t kMask = 0x000F000Fu << kPlace, kSixteen = IsHalf ? 0x4C004C00u : 0x41804180u;
  const int shift = kPlace - 4 * i;
  return mask_or(shift >= 0 ? word << shift : word >> -shift, kMask, kSixteen);
}

// A of product (p, s) from the four words of a lane, one a row.
template <bool IsHalf>
SGLANG_ER_INLINE mma::FragmentA weight_fragment(const uint32_t (&words)[kLaneRows], int p, int s) {
  return {{pair_value<IsHalf>(words[2 * p], 2 * s), pair_value<IsHalf>(words[2 * p + 1], 2 * s),
           pair_value<IsHalf>(words[2 * p], 2 * s + 1), pair_value<IsHalf>(words[2 * p + 1], 2 * s + 1)}};
}

// Input of a group where row `matrix` (i) of the matrices of x for word step jb begins. Registers 2 s and 2 s
// + 1 of a lane are B of both products (p, s).
SGLANG_ER_INLINE int matrix_input(int matrix, int jb) { return matrix * kQuarter + 8 * jb; }
SGLANG_ER_INLINE mma::FragmentB input_fragment(const uint32_t (&loaded)[4], int s) {
  return {{loaded[2 * s], loaded[2 * s + 1]}};
}

// Output of register c of product p, counted from the lane's first row; its column is mma::c_col.
SGLANG_ER_INLINE int output_row(int p, int c) { return 2 * p + c / 2; }

// total += sum over a group of x W, from c = sum x (16 + q) and the sum of x.
SGLANG_ER_INLINE float fold(float total, float c, float sum, float scale, float zero) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(scale, c, __fmaf_rn(__fmaf_rn(-kOffset, scale, zero), sum, total));
#else
  return __builtin_fmaf(scale, c, __builtin_fmaf(__builtin_fmaf(-kOffset, scale, zero), sum, total));
#endif
}

template <bool IsHalf>
SGLANG_ER_INLINE float input_value(uint16_t bits) {
  if constexpr (!IsHalf) return bf16_to_float(bits);
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(bits));
#else
  return static_cast<float>(std::bit_cast<_Float16>(bits));
#endif
}

// The sum of a group of x, always in the same order, however many lanes share it: 16 pieces of 8 neighbours,
// then pieces 8, 4, 2 and 1 apart. `Pieces` of them are one lane's, piece l + i * (16 / Pieces) the i-th of
// lane l.
inline constexpr int kPieces = kGroup / 8;
template <bool IsHalf>
SGLANG_ER_INLINE float piece_sum(const uint32_t (&words)[4]) {
  float sum = 0.0f;
  for (int i = 0; i < 4; ++i) {
    sum += input_value<IsHalf>(static_cast<uint16_t>(words[i])) +
           input_value<IsHalf>(static_cast<uint16_t>(words[i] >> 16));
  }
  return sum;
}
template <int Pieces>
SGLANG_ER_INLINE float lane_sum(float (&pieces)[Pieces]) {
  for (int apart = Pieces / 2; apart > 0; apart /= 2) {
    for (int i = 0; i < apart; ++i) pieces[i] += pieces[i + apart];
  }
  return pieces[0];
}

// How the work is cut. A block of threads takes kTileRows outputs and one split of the groups; its warps are
// kRowPairs pairs of row blocks times kPhases, which take turns at the groups.
inline constexpr int kRowPairs = 4;
inline constexpr int kPhases = 2;
inline constexpr int kTileRows = kRowPairs * kWarpRows;
inline constexpr int kResident =
    2 * 132;  // blocks that run at once on an H100 or H200; fixed, so that others split alike
inline constexpr int kMostSplits = 32;            // sums of more would cost more than they save
inline constexpr int kMostParts = 2 * kResident;  // bounds the workspace

struct Schedule {
  int tiles;         // of outputs
  int splits;        // of the groups; 1: no workspace
  int split_groups;  // groups a split, a multiple of kPhases; the last one may have fewer
};

// Depends on the weight's shape only, so that a row's result depends on nothing else. The cost of a cut:
// waves of blocks, times steps of a block plus one for its start and end.
SGLANG_ER_INLINE Schedule schedule(int64_t rows, int64_t cols) {
  const int groups = static_cast<int>((cols + kGroup - 1) / kGroup);
  const int tiles = static_cast<int>((rows + kTileRows - 1) / kTileRows);
  const int all_steps = groups > 0 ? (groups + kPhases - 1) / kPhases : 1;
  Schedule best{tiles, 1, all_steps * kPhases};
  int64_t least = INT64_MAX;
  for (int wanted = 1; wanted <= kMostSplits; ++wanted) {
    const int steps = (all_steps + wanted - 1) / wanted;
    const int splits = (all_steps + steps - 1) / steps;
    const int64_t parts = int64_t{tiles} * splits;
    if (splits > 1 && parts > kMostParts) break;
    const int64_t cost = (parts + kResident - 1) / kResident * (steps + 1);
    if (cost < least) {
      least = cost;
      best = {tiles, splits, steps * kPhases};
    }
  }
  return best;
}

}  // namespace sglang_er::w4
