// out[M, N] = x[M, K] @ W[N, K]^T + bias with int4 W and full-precision x (W4A16), fp32 accumulation. The
// loops, and who computes what, are in w4_linear.h.
//
// Bound: weight bytes. At M = 1 every packed byte is read once and used once, so the aim is sustained read
// bandwidth; every further row of x adds N*K products but no weight bytes, until the FMA units are the limit.
//
// An instruction set says what operands a word becomes: X, kElements (prepared activations a word, which is
// operands a word), Words, load, for_each_operand, multiply_add, fill_operands, and the tile. Operands may be
// q plus an offset (cheaper to make); shift_zero takes the offset back by way of the sums of x.
#pragma once

#include "w4_linear.h"
#include "w4a16_linear_op.h"

namespace sglang_er::cpu {
namespace {

template <class Set>
struct W4A16 : Set {
  using X = typename Set::X;
  using Acc = Floats;
  static constexpr int kTerms = 1;  // the sum of x
  static constexpr int kWordsPerStep = 1;
  static constexpr int kRowsPerSweep = 1;
  static constexpr int64_t prefetch_bytes(int) { return 1024; }

  template <int T, int R>
  SGLANG_ER_INLINE static void step(const Streams& streams, const X* x, Acc (&acc)[T][R]) {
    typename Set::Words raw[R];
    for (int r = 0; r < R; ++r) {
      prefetch(streams.line(r, 0) + streams.ahead);
      raw[r] = Set::load(streams.line(r, 0));
    }
    Set::template for_each_operand<R>(raw, [&](int operand, int r, const auto& weights) {
      for (int t = 0; t < T; ++t) acc[t][r] = Set::multiply_add(acc[t][r], weights, x + operand * T + t);
    });
  }

  SGLANG_ER_INLINE static Floats finish(Floats acc, Floats scale, Floats zero, const float* terms,
                                        Floats total) {
    return fma(Set::shift_zero(zero, scale), broadcast(terms[0]), fma(scale, acc, total));
  }

  SGLANG_ER_INLINE static void fill_group(const float* values, int group_size, X* elements, int row, int rows,
                                          float* terms) {
    Floats sums = zero();
    for (int k = 0; k < group_size; k += kLanes) sums = add(sums, load(values + k));
    terms[0] = sum(sums);
    Set::fill_operands(values, group_size, elements + row, rows);
  }
};

// What sets with one input an operand share: operand 4*h + i is input i*G/4 + 2*word + h, the order of the
// nibbles in a word.
struct OneInput {
  using X = float;
  static constexpr int kElements = 8;

  SGLANG_ER_INLINE static Floats shift_zero(Floats zero, Floats) { return zero; }  // operands are q itself
  SGLANG_ER_INLINE static Floats multiply_add(Floats acc, Floats weights, const float* x) {
    return fma(weights, broadcast(*x), acc);
  }
  SGLANG_ER_INLINE static void fill_operands(const float* values, int group_size, float* elements,
                                             int stride) {
    for (int word = 0; word < group_size / kWeightsPerWord; ++word) {
      for (int operand = 0; operand < kElements; ++operand) {
        elements[(word * kElements + operand) * stride] =
            values[nibble_input(group_size, word, operand / 4, operand % 4)];
      }
    }
  }
};

}  // namespace
}  // namespace sglang_er::cpu
