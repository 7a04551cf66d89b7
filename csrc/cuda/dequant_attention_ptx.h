// Instructions that only dequant_attention needs, one function each.
#pragma once

#include <cstdint>

#if defined(SGLANG_ER_SIMT)
#include "simt/dequant_attention_ptx.h"  // for threads of a CPU: test/native
#else

namespace sglang_er::cuda {

// Transposes 8 x 8 values of 16 bits, two neighbours of a row in a lane: C of a product becomes B of the
// next.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// 2^x, subnormal results as zero.
__device__ __forceinline__ float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Bf16 values that a lane loads at once; zeros for a token that does not count (slot -1), whatever the pool
// holds. A predicate instead of a branch: all loads of a tile are under way together.
template <int Words>
__device__ __forceinline__ void load_pool(const uint16_t* values, int64_t stride, int slot, int dim,
                                          uint32_t (&words)[Words]) {
  static_assert(Words == 2 || Words == 4);
  const uint16_t* from = values + slot * stride + dim;
  if constexpr (Words == 4) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ge.s32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
        : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
        : "l"(from), "r"(slot));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ge.s32 p, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
        "@p ld.global.v2.b32 {%0, %1}, [%2];\n}"
        : "=&r"(words[0]), "=&r"(words[1])
        : "l"(from), "r"(slot));
  }
}

}  // namespace sglang_er::cuda

#endif

namespace sglang_er::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Words of one vector in a lane, loaded at once.
template <int Words>
__device__ __forceinline__ void load_words(const void* from, uint32_t (&words)[Words]) {
  static_assert(Words == 1 || Words == 2 || Words == 4);
  if constexpr (Words == 4) {
    const uint4 loaded = *static_cast<const uint4*>(from);
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  } else if constexpr (Words == 2) {
    const uint2 loaded = *static_cast<const uint2*>(from);
    words[0] = loaded.x, words[1] = loaded.y;
  } else {
    words[0] = *static_cast<const uint32_t*>(from);
  }
}

}  // namespace sglang_er::cuda
