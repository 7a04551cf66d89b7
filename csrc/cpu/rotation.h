// Normalized Walsh-Hadamard transform of a vector, block by block. Only sums, differences and one product:
// the same bits on every instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "sglang_er/kv_shadow.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

// Butterflies between neighbours at distance Half < 16, inside sixteen values.
template <int Half>
SGLANG_ER_INLINE void butterfly_lanes(float* values) {
  using Lanes = float __attribute__((vector_size(64)));
  using Indices = int __attribute__((vector_size(64)));
  Indices low, high;
  Lanes sign, x;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & ~Half;
    high[i] = i | Half;
    sign[i] = (i & Half) != 0 ? -1.0f : 1.0f;
  }
  std::memcpy(&x, values, sizeof(x));
  x = __builtin_shuffle(x, low) + sign * __builtin_shuffle(x, high);
  std::memcpy(values, &x, sizeof(x));
}

// dim is a multiple of kInt4DimMultiple.
SGLANG_ER_INLINE void rotate(float* values, int dim) {
  const int block = rotation_block(dim);
  for (int d = 0; d < dim; d += kLanes) {
    butterfly_lanes<1>(values + d);
    butterfly_lanes<2>(values + d);
    butterfly_lanes<4>(values + d);
    butterfly_lanes<8>(values + d);
  }
  for (int half = kLanes; half < block; half *= 2) {
    for (int first = 0; first < dim; first += 2 * half) {
      for (int d = first; d < first + half; d += kLanes) {
        const Floats a = load(values + d), b = load(values + d + half);
        store(values + d, add(a, b));
        store(values + d + half, sub(a, b));
      }
    }
  }
  const Floats norm = broadcast(1.0f / std::sqrt(static_cast<float>(block)));
  for (int d = 0; d < dim; d += kLanes) store(values + d, mul(load(values + d), norm));
}

}  // namespace
}  // namespace sglang_er::cpu
