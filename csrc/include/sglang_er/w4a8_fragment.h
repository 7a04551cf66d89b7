// How a warp multiplies 32 rows of a packed weight (packed_weight.h, groups of 128) with int8 levels of x on
// m16n8k32 products: every index and every bit trick of csrc/cuda/w4a8_linear, host and device.
// Who takes which words and rows is in w4_fragment.h.
//
// A is the weight, B is x. A word's low nibbles, masked where they lie, are four bytes of one row, and so are
// its high ones: two registers of A in three operations. The inner index is permuted by that, so levels of x
// are stored in its order: byte 64 * n + 4 * j + c of a group meets byte c of nibbles n (low, high) of word
// j.
//
// Levels of x, for a row and a group, in fp32, ties to even:
//   top = max(max |x|, 2^-110)     scale = top / 127     level = round(x * (127 / top))
// A group with a NaN or an infinity has the scale NaN and levels 0. Integer products are exact. A group adds
//   w_scale * scale * sum level q + w_zero * scale * sum level
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "sglang_er/mma.h"
#include "sglang_er/w4_fragment.h"

namespace sglang_er::w4a8 {

using w4::kGroup;
using w4::kProducts;
using w4::kWordSteps;

inline constexpr uint32_t kNibbles = 0x0F0F0F0Fu;
inline constexpr int kHalf = kGroup / 2;  // bytes of a group that meet low nibbles, then those of high ones
inline constexpr int kWordStepLevels = kHalf / kWordSteps;  // bytes of a word step in either half
inline constexpr int kLaneLevels = kGroup / mma::kLanes;    // of the warp that quantizes a group of x
inline constexpr float kLargestLevel = 127.0f;
inline constexpr float kLeastTop = 0x1p-110f;  // keeps 127 / top finite

// A of word step jb and row pair p from the four words of a lane, one a row.
SGLANG_ER_INLINE mma::FragmentA weight_fragment(const uint32_t (&words)[w4::kLaneRows], int p) {
  const uint32_t first = words[2 * p], second = words[2 * p + 1];
  return {{first & kNibbles, second & kNibbles, first >> 4 & kNibbles, second >> 4 & kNibbles}};
}

// ldmatrix.x4 of word steps jb (even) and jb + 1: byte of a group where a row of matrix i begins. Registers 2
// s and 2 s + 1 of a lane are B of word step jb + s.
SGLANG_ER_INLINE int matrix_byte(int matrix, int jb) {
  return matrix % 2 * kHalf + (jb + matrix / 2) * kWordStepLevels;
}
SGLANG_ER_INLINE mma::FragmentB input_fragment(const uint32_t (&loaded)[4], int s) {
  return {{loaded[2 * s], loaded[2 * s + 1]}};
}

// A lane of the quantizing warp writes bytes kLaneLevels * lane and the following ones of a group. They are
// two pairs of neighbours of x: bytes 0 and 2 are inputs first_input(lane, 0) and + 1, bytes 1 and 3 are
// first_input(lane, 1) and + 1.
SGLANG_ER_INLINE int first_input(int lane, int pair) {
  const int nibble = lane / 16, word = lane % 16;
  return (2 * pair + nibble) * w4::kQuarter + 2 * word;
}

struct Quantizer {
  float inverse, scale;
};
// `top_bits`: of the largest |x| of the group; those of a NaN are above infinity's.
SGLANG_ER_INLINE bool is_finite(uint32_t top_bits) { return top_bits < 0x7F800000u; }
SGLANG_ER_INLINE Quantizer quantizer(float top) {
  top = top > kLeastTop ? top : kLeastTop;
#if defined(__CUDA_ARCH__)
  return {__fdiv_rn(kLargestLevel, top), __fdiv_rn(top, kLargestLevel)};
#else
  return {kLargestLevel / top, top / kLargestLevel};
#endif
}
SGLANG_ER_INLINE int level(float x, float inverse) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(__fmul_rn(x, inverse));
#else
  return static_cast<int>(std::nearbyint(x * inverse));
#endif
}
SGLANG_ER_INLINE uint32_t pack_levels(const int (&levels)[kLaneLevels]) {
  uint32_t word = 0;
  for (int c = 0; c < kLaneLevels; ++c) word |= (static_cast<uint32_t>(levels[c]) & 0xFFu) << 8 * c;
  return word;
}

// What the products need of a row of x beside its levels: scale and scale * sum of the levels.
struct RowNumbers {
  float scale, sum;
};

// Sums of products begin at kStart, the bits of the float 3 * 2^22: as a float a sum is then 3 * 2^22 + sum
// level * q, exactly, since that is below 2^22. Times scale, a bf16 below 2^104, plus fold_offset(scale),
// which is exact, it is scale * sum level * q, rounded once: no conversion.
inline constexpr int kStart = 0x4B400000;
SGLANG_ER_INLINE float fold_offset(float scale) { return -0x1.8p23f * scale; }

// total += a group's share, from c = kStart + sum level * q.
SGLANG_ER_INLINE float fold(float total, int c, RowNumbers x, float scale, float offset, float zero) {
#if defined(__CUDA_ARCH__)
  const float scaled = __fmaf_rn(__int_as_float(c), scale, offset);
  return __fmaf_rn(zero, x.sum, __fmaf_rn(scaled, x.scale, total));
#else
  const float scaled = __builtin_fmaf(std::bit_cast<float>(c), scale, offset);
  return __builtin_fmaf(zero, x.sum, __builtin_fmaf(scaled, x.scale, total));
#endif
}

}  // namespace sglang_er::w4a8
