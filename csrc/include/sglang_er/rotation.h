// The Walsh-Hadamard transform of kv_shadow.h on a vector that lies across the lanes of a warp.
//
// Lane l holds dimensions [l * E, l * E + E), E = lane_elements(dim): one load a lane, and lanes past the end
// of the vector hold zeros. Stages at distance 1 .. E/2 stay inside a lane, those at E .. block/2 pair a lane
// with lane ^ (distance / E). Every stage adds the same two numbers as the plain loop and the normalization
// comes last, so the result has the bits of the reference.
#pragma once

#include <cmath>

#include "sglang_er/kv_shadow.h"
#include "sglang_er/macros.h"

namespace sglang_er {

inline constexpr int kWarpLanes = 32;
inline constexpr int kMaxVectorDim = 256;

SGLANG_ER_INLINE constexpr int lane_elements(int dim) { return dim <= 64 ? 2 : dim <= 128 ? 4 : 8; }

// For the host, once a call: the GPU's square root and division need not be asked for.
inline float rotation_norm(int dim) { return 1.0f / std::sqrt(static_cast<float>(rotation_block(dim))); }

template <int E>
SGLANG_ER_INLINE void butterflies_in_lane(float (&x)[E]) {
  for (int half = 1; half < E; half *= 2) {
    for (int i = 0; i < E; ++i) {
      if ((i & half) != 0) continue;
      const float low = x[i], high = x[i + half];
      x[i] = low + high;
      x[i + half] = low - high;
    }
  }
}

// The new value of a lane, from its own and that of the lane it is paired with.
SGLANG_ER_INLINE float butterfly(float own, float other, bool own_is_high) {
  return own_is_high ? other - own : own + other;
}

}  // namespace sglang_er
