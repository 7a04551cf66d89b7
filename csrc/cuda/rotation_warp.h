// rotation.h by one warp: the lanes are paired by shuffles.
#pragma once

#include "sglang_er/rotation.h"

namespace sglang_er::cuda {

// block = rotation_block(dim), norm = rotation_norm(dim). All lanes must call it.
template <int E>
__device__ __forceinline__ void rotate_in_warp(float (&x)[E], int block, float norm, int lane) {
  butterflies_in_lane<E>(x);
  for (int half = E; half < block; half *= 2) {
    const int distance = half / E;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, x[i], distance);
      x[i] = butterfly(x[i], other, (lane & distance) != 0);
    }
  }
#pragma unroll
  for (int i = 0; i < E; ++i) x[i] *= norm;
}

}  // namespace sglang_er::cuda
