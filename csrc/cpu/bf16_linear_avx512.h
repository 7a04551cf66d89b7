// What bf16_linear needs of AVX-512, with and without dot products of bf16 pairs.
#pragma once

#include <immintrin.h>

#include "bf16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx512 {
  static constexpr bool kDot = false;
  static constexpr int kMaxTile = 6;
  static constexpr int rows_at_once(int) { return 4; }  // 24 sums, 6 inputs, a weight, a mask
  static constexpr bool prefetches(int) { return true; }
  static constexpr bool kNear = false;
  static constexpr bool unrolls(int tile) { return tile <= 4; }
  static constexpr int64_t kStripeRows = 64;  // 128 KiB of bf16 in a slice: L2 holds it and the next one

  // Little-endian: in a word of two bf16 the even input is the low half.
  SGLANG_ER_INLINE static Floats even(const BFloat16* weights) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(weights), 16))};
  }
  SGLANG_ER_INLINE static Floats odd(const BFloat16* weights) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(weights), _mm512_set1_epi32(-0x10000)))};
  }

  // Left to choose, GCC reads x again for every row of W where that has room (6 and 7 rows of x, of all
  // numbers): twice the loads, half the speed at 6.
  SGLANG_ER_INLINE static void hold(Floats& inputs) { asm("" : "+v"(inputs.v)); }
};

}  // namespace
}  // namespace sglang_er::cpu
