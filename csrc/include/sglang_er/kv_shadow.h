// Layout of the KV shadow: a quantized copy of one layer's KV pool, slot by slot, that a draft may read
// instead.
//
// For every slot and KV head, keys and values are quantized on their own, symmetrically, with one bf16 scale:
//   int8  x = q * scale, q in [-127, 127], scale = max(bf16(max|x| / 127), 2^-126)
//   int4  x = (n - 7.5) * scale, n in [0, 15], scale = max(bf16(max|x| / 8), 2^-126): sixteen equal cells
//         over [-max|x|, max|x|]
//   fp8   x = f * scale, f an e4m3fn number up to 448, scale = max(bf16(max|x| / 448), 2^-126): the largest
//         value becomes 448, so none saturates; off by at most |x| / 17, or scale / 1024 where that is more
// so a score is scale * (q . levels) and a weighted value is (p * scale) * levels. int4 keys are rotated
// first by a normalized Walsh-Hadamard transform over blocks of rotation_block(head_dim) dimensions, which
// spreads the few large dimensions that keys have; queries are rotated the same way and the scores stay what
// they were.
//
//   int8  keys, values  int8  [slots, kv_heads, dim]
//   fp8   keys, values  uint8 [slots, kv_heads, dim], codes of e4m3fn, none of them NaN
//   int4  keys          uint8 [slots, kv_heads, head_dim / 2], byte i = dimensions 2i (low nibble) and 2i + 1
//         values        uint8 [slots, kv_heads, value_dim / 2], byte i of 16 = dimensions i (low) and 16 + i
//         of 32
//   key_scales, value_scales  bf16 [slots, kv_heads]
//
// int4: (dim / 2 + 2) bytes against 2 * dim of a bf16 pool, 26.6 % at 64 and 25.8 % at 128.
#pragma once

#include "sglang_er/macros.h"

namespace sglang_er {

enum class ShadowFormat { kInt8, kInt4, kFp8 };

inline constexpr int kInt4DimMultiple = 32;  // of head_dim and value_dim, for int4

// Of one vector.
SGLANG_ER_INLINE int level_bytes_of(int dim, ShadowFormat format) {
  return format == ShadowFormat::kInt4 ? dim / 2 : dim;
}

// The largest power of two that divides head_dim.
SGLANG_ER_INLINE int rotation_block(int head_dim) { return head_dim & -head_dim; }

}  // namespace sglang_er
