// A packed weight in exact buffers, read element by element as packed_weight.h describes it.
#pragma once

#include "quantize_pack_op.h"
#include "sglang_er/quantize.h"
#include "testing.h"

namespace sglang_er::cpu {

struct Packed {
  PackedShape shape;
  Exact<uint8_t> packed;
  Exact<uint16_t> scales_zeros;

  int level(int64_t n, int64_t k) const {
    const int64_t group = k / shape.group_size;
    const int input = static_cast<int>(k % shape.group_size), quarter = shape.group_size / 4;
    const int word = input % quarter / 2, shift = nibble_shift(input % 2, input / quarter);
    const int64_t block = (n / kRowBlock * shape.groups() + group) * shape.group_bytes();
    const int64_t byte = block + word * kWordBytes + n % kRowBlock * 4 + shift / 8;
    return packed[byte] >> (shift % 8) & 15;
  }
  uint16_t meta(int64_t n, int64_t group, int which) const {
    return scales_zeros[((n / kRowBlock * shape.groups() + group) * 2 + which) * kRowBlock + n % kRowBlock];
  }
  double scale(int64_t n, int64_t k) const { return bf16_to_float(meta(n, k / shape.group_size, 0)); }
  double zero(int64_t n, int64_t k) const { return bf16_to_float(meta(n, k / shape.group_size, 1)); }
  double value(int64_t n, int64_t k) const { return level(n, k) * scale(n, k) + zero(n, k); }
  // Of the terms that kernels add: they bound the rounding error.
  double magnitude(int64_t n, int64_t k) const { return 15 * scale(n, k) + std::abs(zero(n, k)); }
};

inline Packed pack(const Matrix& weight, int group_size, int threads, bool clip_search = false) {
  const PackedShape shape{weight.rows, weight.cols, group_size};
  Packed made{shape, Exact<uint8_t>(shape.packed_bytes(), 0xAB),
              Exact<uint16_t>(shape.meta_values(), 0x7FC0)};
  quantize_pack({.weight = weight.data(),
                 .weight_stride = weight.stride,
                 .weight_type = weight.type,
                 .packed = made.packed.data(),
                 .scales_zeros = made.scales_zeros.data(),
                 .shape = shape,
                 .clip_search = clip_search,
                 .threads = threads});
  return made;
}

}  // namespace sglang_er::cpu
