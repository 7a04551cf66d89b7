// out[M, N] = x^[M, K] @ W[N, K]^T + bias with int4 W, the very buffers of w4a16_linear, and x quantized on
// the fly to int8 (W4A8). The loops, and who computes what, are in w4_linear.h.
//
// Activations: symmetric, one scale per row of x and weight group. For a group's inputs of one row
//   scale = max(max |x_k|, 2^-110) / 127    level_k = round(x_k * (1 / scale))    x^_k = scale * level_k
// with 1 / scale computed as 127 / max(...), all in fp32, ties to even. 2^-110 keeps the reciprocal finite;
// all-zero groups need no case of their own. A group with a NaN or an infinity gets the scale NaN and levels
// 0: the row's outputs are NaN, and no conversion sees a value that it cannot represent.
//
// Products: integers, exact, so every instruction set has the same accumulators. A group adds
//   w_scale * scale * sum_k level_k*q_k  +  w_zero * scale * sum_k level_k
// Both terms use the quantized x, so that the error of a level meets w_scale*q_k + w_zero = W. If the second
// term took the exact sum of x, it would meet w_scale*q_k alone, three times as large for weights around zero
// (w_zero is the group's minimum).
//
// Bound: weight bytes while M <= 8 or so; then the integer dot products, 4 inputs x 16 rows an instruction.
//
// An instruction set says Acc, tile, to_floats, store_levels, and step: word & 0x0F0F0F0F and (word >> 4) &
// 0x0F0F0F0F are each 4 inputs of each of 16 rows, which meet 4 levels of x in the same order.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstring>

#include "w4_linear.h"
#include "w4a8_linear_op.h"

namespace sglang_er::cpu {
namespace {

// Levels of one row for the 4 words of a step: [nibble of a byte: low, high][word][4 bytes].
constexpr int kStepWords = 4;
constexpr int kStepInputs = kStepWords * kWeightsPerWord;
constexpr int kStepElements = 2 * kStepWords;

constexpr float kLargestLevel = 127.0f;
constexpr float kLeastMaximum = 0x1p-110f;
constexpr uint32_t kNibbles = 0x0F0F0F0Fu;

// Where a step finds the 4 levels that meet nibble `high` of the bytes of `word`, in row t of the tile.
SGLANG_ER_INLINE const uint32_t* levels_of(const uint32_t* x, int t, int word, int high) {
  return x + t * kStepElements + high * kStepWords + word;
}

// even[0], odd[0], even[1], odd[1], ...: 8 levels of each into 16 bytes.
SGLANG_ER_INLINE void interleave(const int8_t* even, const int8_t* odd, uint32_t* out) {
#if defined(__SSE2__)
  const auto eight = [](const int8_t* levels) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(levels));
  };
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(eight(even), eight(odd)));
#else
  int8_t bytes[16];
  for (int i = 0; i < 8; ++i) bytes[2 * i] = even[i], bytes[2 * i + 1] = odd[i];
  std::memcpy(out, bytes, sizeof(bytes));
#endif
}

template <class Set>
struct W4A8 : Set {
  using X = uint32_t;  // 4 levels
  using Acc = typename Set::Acc;
  static constexpr int kElements = 2;
  static constexpr int kTerms = 2;  // scale and scale * sum of the levels
  static constexpr int kWordsPerStep = kStepWords;
  static constexpr int kRowsPerSweep = 8;

  SGLANG_ER_INLINE static Floats finish(const Acc& acc, Floats scale, Floats zero, const float* terms,
                                        Floats total) {
    total = fma(mul(Set::to_floats(acc), scale), broadcast(terms[0]), total);
    return fma(zero, broadcast(terms[1]), total);
  }

  SGLANG_ER_INLINE static void quantize_group(const float* values, int group_size, int8_t* levels,
                                              float* terms) {
    Floats maxima = broadcast(kLeastMaximum);
    for (int k = 0; k < group_size; k += kLanes) maxima = max(maxima, abs(load(values + k)));
    const float maximum = reduce_max(maxima);
    const Floats inverse = broadcast(kLargestLevel / maximum);
    Floats sums = zero();
    for (int k = 0; k < group_size; k += kLanes) {
      const Floats rounded = round(mul(load(values + k), inverse));
      sums = add(sums, rounded);  // exact: integers below 2^24
      Set::store_levels(levels + k, rounded);
    }
    const float sum_of_levels = sum(sums);
    const float scale = maximum / kLargestLevel;
    terms[0] = scale;
    terms[1] = scale * sum_of_levels;
    // max() may have dropped a NaN, but the sum keeps it, and an infinity makes it NaN by 0 * inf.
    if (__builtin_isnan(sum_of_levels)) {
      std::memset(levels, 0, static_cast<size_t>(group_size));
      terms[0] = terms[1] = sum_of_levels;
    }
  }

  // Byte b of a word holds half h = b / 2 and positions 2*(b % 2) + {0, 1} (low, high nibble): so the low
  // nibbles of consecutive words meet the first and third quarter of the group interleaved byte by byte, the
  // high nibbles the second and fourth.
  SGLANG_ER_INLINE static void fill_group(const float* values, int group_size, X* elements, int row, int rows,
                                          float* terms) {
    alignas(64) int8_t levels[kMaxGroupSize];
    quantize_group(values, group_size, levels, terms);
    const int quarter = group_size / 4;
    for (int step = 0; step < group_size / kStepInputs; ++step) {
      const int8_t* source = levels + step * kStepInputs / 4;
      X* target = elements + (step * rows + row) * kStepElements;
      interleave(source, source + 2 * quarter, target);
      interleave(source + quarter, source + 3 * quarter, target + kStepWords);
    }
  }
};

}  // namespace
}  // namespace sglang_er::cpu
