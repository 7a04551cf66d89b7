// Layout of a packed int4 weight W[N, K] (N outputs, K inputs), shared by every kernel and by the reference.
//
// Rows are taken in blocks of 16 (the lanes of a 512-bit register), inputs in groups of G (G % 32 == 0).
// N is padded to a multiple of 16 and K to a multiple of G. Two buffers:
//
//   packed        uint8 [N/16][K/G][G/8][16 lanes][4 bytes]
//                 One little-endian 32-bit word holds 8 weights of one row. In word j of a group, the nibble
//                 at bits 16*h + 4*i (h = 0..1, i = 0..3) is input k = i*G/4 + 2*j + h of that group.
//   scales_zeros  bf16 [N/16][K/G][2][16 lanes]   scale in [0], zero in [1]; W = q*scale + zero
//
// Why so: 16 rows share every activation, so a kernel broadcasts x and never reduces across lanes; bits 0-15
// and 16-31 of a shifted word are neighbours k, k+1 of one row (a bf16 pair); the four nibbles of a half word
// lie G/4 apart, so that the quantizer joins whole registers by shifts instead of shuffling nibbles.
// Masking with 0x0F0F0F0F gives four bytes of one row (int8 dot products). 4 + 32/G bits a weight.
// Padding has q = 0; padded rows have scale = zero = 0 as well.
#pragma once

#include <cstdint>

#include "sglang_er/macros.h"

namespace sglang_er {

inline constexpr int kRowBlock = 16;        // rows per block = lanes
inline constexpr int kWordBytes = 64;       // one 32-bit word for each of the 16 lanes
inline constexpr int kWeightsPerWord = 8;   // nibbles in a 32-bit word
inline constexpr int kGroupMultiple = 32;   // group sizes are multiples of this
inline constexpr int kMaxGroupSize = 1024;  // bounds the quantizer's stack buffers

struct PackedShape {
  int64_t rows;    // N
  int64_t cols;    // K
  int group_size;  // G

  SGLANG_ER_INLINE int64_t row_blocks() const { return (rows + kRowBlock - 1) / kRowBlock; }
  SGLANG_ER_INLINE int64_t groups() const { return (cols + group_size - 1) / group_size; }
  SGLANG_ER_INLINE int64_t padded_cols() const { return groups() * group_size; }
  SGLANG_ER_INLINE int words() const { return group_size / kWeightsPerWord; }  // per row and group
  SGLANG_ER_INLINE int64_t group_bytes() const { return int64_t{words()} * kWordBytes; }
  SGLANG_ER_INLINE int64_t block_bytes() const { return groups() * group_bytes(); }
  SGLANG_ER_INLINE int64_t block_meta() const { return groups() * 2 * kRowBlock; }  // bf16 values
  SGLANG_ER_INLINE int64_t packed_bytes() const { return row_blocks() * block_bytes(); }
  SGLANG_ER_INLINE int64_t meta_values() const { return row_blocks() * block_meta(); }
};

// Input index, inside its group, of nibble (half h, position i) of word j.
SGLANG_ER_INLINE int nibble_input(int group_size, int word, int half, int position) {
  return position * (group_size / 4) + 2 * word + half;
}

SGLANG_ER_INLINE int nibble_shift(int half, int position) { return 16 * half + 4 * position; }

}  // namespace sglang_er
