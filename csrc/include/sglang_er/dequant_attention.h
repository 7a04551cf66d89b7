// Decode attention over an int4 KV shadow: which lane of a warp holds what, and how levels become operands of
// the tensor cores. Host and device, so that tests can run a warp without a GPU.
//
// The products are mma.h's m16n8k16 in bf16 with fp32 sums; g = lane / 4, t = lane % 4. A lane's part of A
// are rows g and g + 8 at k = 2t, 2t + 1, 2t + 8, 2t + 9, its part of B is column g at the same k, and of C
// rows g and g + 8 at columns 2t and 2t + 1.
//
// A's rows are tokens, then dimensions; the columns are the query heads of one KV head: keys and values,
// which are many, fill all 16 rows, and the few heads fill the 8 columns.
//
// Scores = K q. Rows are 16 tokens, k is the dimension. Any order of the dimensions will do if K and q share
// it, so lane t takes the t-th quarter of a key's bytes, one load, and word w of it makes two steps: nibbles
// i and i + 4 are a pair (mask, or in 0x4300: bf16 128 + n, exact). The offset leaves the inner loop:
//     sum (n - 7.5) q = -135.5 * sum q + sum (128 + n) q
// with the first term as the sum's initial value. The terms cancel to about 1/30 (q of independent signs), at
// worst, all of q in one sign, |q|_1 * 136 * 2^-23 per step of 8 fp32 sums is left: 1e-4 of a level, under
// the rounding of q. The rotated q is fp32; rounded to bf16 it would cost 2^-9, so it enters as two bf16,
// high and low, with sum q taken over what enters: 2^-17, for eight more instructions of a unit that is idle
// (16 tokens take ~140 clocks of an SM's share of HBM, their 24 matrix instructions ~40).
//
// Output = V^T p. Rows are 16 dimensions, k is the token. Tokens 2t and 2t + 1 must share a register: one
// byte permutation joins the same two bytes of both (four nibbles each), then shift, mask and or as above.
// Here the offset may not wait for the end: the sum runs over a whole context and what is left is small
// (values of both signs), so 135.5 * sum p would drown it. Shifted by one more bit, 0x4301 | 2n is 129 + 2n;
// minus 144 is 2n - 15 = 2 (n - 7.5), exact in bf16: one subtraction a pair, and the factor goes into p, with
// the token's scale. p * scale is rounded to bf16.
//
// p comes out of the scores with tokens in rows (C) and is wanted with tokens in k (B): a transposition of 8
// x 8.
#pragma once

#include <cstdint>

#include "sglang_er/bfloat16.h"
#include "sglang_er/bits.h"
#include "sglang_er/macros.h"
#include "sglang_er/mma.h"

namespace sglang_er::dequant_attention {

using mma::FragmentA;
using mma::FragmentB;

inline constexpr int kWarps = 4;        // of a block; they share a chunk, step by step in turn
inline constexpr int kStepTokens = 32;  // that a warp takes at a time
inline constexpr int kTileTokens = 16;
inline constexpr int kTileHeads = 8;
inline constexpr float kLowest = -3.4028235e38f;  // as the largest score so far; finite, so no inf - inf
inline constexpr float kKeyOffset = -135.5f;      // -(128 + 7.5)
inline constexpr float kValueFactor = 0.5f;       // levels of values come doubled

// A warp takes steps at `first`, which is its own, and every kWarps steps from there. Position of step i:
SGLANG_ER_INLINE int step_position(int first, int i) { return first + i * kWarps * kStepTokens; }
// How many of them begin before `limit`.
SGLANG_ER_INLINE int steps_before(int first, int limit) {
  const int distance = kWarps * kStepTokens;
  return limit <= first ? 0 : (limit - first + distance - 1) / distance;
}
// Position of the first one that has a token at `limit` or later.
SGLANG_ER_INLINE int first_step_past(int first, int limit) {
  return step_position(first, steps_before(first + kStepTokens - 1, limit));
}

template <int Dim>
struct Layout {
  static_assert(Dim == 64 || Dim == 128);
  static constexpr int kRowBytes = Dim / 2;         // of an int4 key or value
  static constexpr int kRowUnits = kRowBytes / 16;  // what one asynchronous copy moves
  static constexpr int kStepBytes = kStepTokens * kRowBytes;
  static constexpr int kKeyWords = Dim / 32;    // 32-bit words of a key in a lane
  static constexpr int kKeySteps = Dim / 16;    // matrix products of a tile of scores
  static constexpr int kValueBytes = Dim / 16;  // of a value in a lane
  static constexpr int kValueWords = kValueBytes / 4;
  static constexpr int kValueTiles = kValueBytes;  // of 16 dimensions: both nibbles of a byte, in eight lanes
  static constexpr int kQueryWords = kKeySteps * 32 * 2;  // of all B operands of 8 heads

  // Byte of unit `unit` of row `row` in a step's buffer. Lines of 128 bytes, units permuted within: the four
  // tokens 2t that eight lanes read a value of lie in different banks.
  SGLANG_ER_INLINE static int unit_offset(int row, int unit) {
    const int linear = row * kRowUnits + unit;
    return (linear & ~7) * 16 + ((linear ^ (linear / 8 % 4 * 2)) & 7) * 16;
  }
  SGLANG_ER_INLINE static int key_offset(int row, int lane) {
    const int byte = lane % 4 * (kRowBytes / 4);
    return unit_offset(row, byte / 16) + byte % 16;
  }
  SGLANG_ER_INLINE static int value_offset(int row, int lane) {
    const int byte = lane / 4 * kValueBytes;
    return unit_offset(row, byte / 16) + byte % 16;
  }
  // Dimension of row g (high: row g + 8) of tile `tile` in lane g * 4 + t.
  SGLANG_ER_INLINE static int value_dim(int lane, int tile, bool high) {
    const int byte = lane / 4 * kValueBytes;
    return byte / 16 * 32 + byte % 16 + tile + (high ? 16 : 0);
  }

  // bf16 position, among the B operands [step][lane][2 regs][2 halves] of 8 heads, of a dimension of a
  // rotated q.
  SGLANG_ER_INLINE static int query_position(int head, int dim) {
    const int t = dim / (Dim / 4), word = dim % (Dim / 4) / 8, nibble = dim % 8;
    return position(head, t, 2 * word + nibble % 4 / 2, nibble % 2, nibble / 4);
  }
  // The same for keys of the pool: lane t loads units of eight dimensions t, t + 4, ...; each makes two
  // steps.
  SGLANG_ER_INLINE static int pool_query_position(int head, int dim) {
    const int unit = dim / 8, word = dim % 8 / 2;
    return position(head, unit % 4, unit / 4 * 2 + word / 2, word % 2, dim % 2);
  }
  SGLANG_ER_INLINE static int pool_key_dim(int lane, int load) { return (load * 4 + lane % 4) * 8; }

 private:
  SGLANG_ER_INLINE static int position(int head, int t, int step, int reg, int half) {
    return ((step * 32 + head * 4 + t) * 2 + reg) * 2 + half;
  }
};

// Bytes of low and high that `selector` names (0-3: low, 4-7: high), the lowest first.
SGLANG_ER_INLINE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, selector);
#else
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(both >> (selector >> (4 * i) & 7) * 8 & 0xFF) << (8 * i);
  return out;
#endif
}

// Halves 0 of both words, or halves 1: neighbours in k.
SGLANG_ER_INLINE uint32_t pair_halves(uint32_t even, uint32_t odd, int half) {
  return permute_bytes(even, odd, half == 0 ? 0x5410 : 0x7632);
}

// bf16 (128 + nibble i, 128 + nibble i + 4) of a word of a key.
SGLANG_ER_INLINE uint32_t key_pair(uint32_t word, int i) {
  return mask_or(word >> (4 * i), 0x000F000Fu, 0x43004300u);
}

// bf16 (129 + 2 * nibble i) of both halves of a word.
SGLANG_ER_INLINE uint32_t odd_levels(uint32_t word, int i) {
  return mask_or(i == 0 ? word << 1 : word >> (4 * i - 1), 0x001E001Eu, 0x43014301u);
}

SGLANG_ER_INLINE uint32_t subtract_144(uint32_t pair) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(pair), "r"(0x43104310u));
  return out;
#else
  const auto one = [](uint32_t bits) {
    return static_cast<uint32_t>(float_to_bf16(bf16_to_float(static_cast<uint16_t>(bits)) - 144.0f));
  };
  return one(pair & 0xFFFF) | one(pair >> 16) << 16;
#endif
}

// Step 2 * word + half of a tile of scores, from word `word` of the keys of tokens g and g + 8.
SGLANG_ER_INLINE FragmentA key_operand(uint32_t first, uint32_t second, int half) {
  return {{key_pair(first, 2 * half), key_pair(second, 2 * half), key_pair(first, 2 * half + 1),
           key_pair(second, 2 * half + 1)}};
}

// Tile 4 * word + 2 * half + byte of a tile of values; tokens01 joins half `half` of word `word` of tokens 2t
// and 2t + 1, tokens89 that of tokens 2t + 8 and 2t + 9.
SGLANG_ER_INLINE FragmentA value_operand(uint32_t tokens01, uint32_t tokens89, int byte) {
  return {{subtract_144(odd_levels(tokens01, 2 * byte)), subtract_144(odd_levels(tokens01, 2 * byte + 1)),
           subtract_144(odd_levels(tokens89, 2 * byte)), subtract_144(odd_levels(tokens89, 2 * byte + 1))}};
}

// Row of a tile that register r (0..3) of a value operand's four tokens stands for: 2t, 2t + 1, 2t + 8, 2t
// + 9.
SGLANG_ER_INLINE int value_row(int lane, int r) { return lane % 4 * 2 + r % 2 + r / 2 * 8; }

// bf16 (low, high), rounded to nearest even.
SGLANG_ER_INLINE uint32_t bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
#endif
}

// The two bf16 that stand for a rotated q.
struct HighLow {
  uint16_t high, low;
};
SGLANG_ER_INLINE HighLow high_low(float value) {
  const uint16_t high = float_to_bf16(value);
  return {high, float_to_bf16(value - bf16_to_float(high))};
}

}  // namespace sglang_er::dequant_attention
