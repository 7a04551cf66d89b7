// In the place of CUDA's own: the language's words, types and functions that our kernels use, for threads.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/threads.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__

using std::max;
using std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace sglang_er::cuda {
inline constexpr size_t kSharedBytes = SGLANG_ER_SHARED_KB << 10;
extern uint8_t memory[kSharedBytes];  // the shared memory of all kernels that declare it by this name
}  // namespace sglang_er::cuda

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline void __threadfence() {}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
inline uint32_t atomicInc(uint32_t* counter, uint32_t most) {
  const uint32_t before = *counter;
  *counter = before >= most ? 0 : before + 1;
  return before;
}

inline void __syncthreads() { sglang_er::simt::Block::now().synchronize(); }

namespace sglang_er::simt {

// Lane i gets what lane from(i) gives.
template <class T, class From>
T shuffle(T value, const From& from) {
  struct Operands {
    T given, taken;
  } own{value, value};
  Block::now().together(own, [&](const auto& lanes) {
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      const int other = from(lane);
      if (other >= 0 && other < kWarpThreads) lanes[lane]->taken = lanes[other]->given;
    }
  });
  return own.taken;
}

// What all lanes get: combine(a, b) over all of them.
template <class T, class Combine>
T reduce(T value, const Combine& combine) {
  struct Operands {
    T given, taken;
  } own{value, value};
  Block::now().together(own, [&](const auto& lanes) {
    T all = lanes[0]->given;
    for (int lane = 1; lane < kWarpThreads; ++lane) all = combine(all, lanes[lane]->given);
    for (auto* lane : lanes) lane->taken = all;
  });
  return own.taken;
}

}  // namespace sglang_er::simt

inline void __syncwarp() {
  sglang_er::simt::reduce(0, [](int a, int) { return a; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return sglang_er::simt::shuffle(value, [=](int lane) { return lane ^ distance; });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  return sglang_er::simt::shuffle(value, [=](int lane) { return lane - distance; });
}
// Every lane names its own source.
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  struct Operands {
    T given, taken;
    int source;
  } own{value, value, source};
  sglang_er::simt::Block::now().together(own, [](const auto& lanes) {
    for (auto* lane : lanes) lane->taken = lanes[lane->source % sglang_er::simt::kWarpThreads]->given;
  });
  return own.taken;
}
inline uint32_t __ballot_sync(unsigned, bool value) {
  const int lane = static_cast<int>(threadIdx.x) % sglang_er::simt::kWarpThreads;
  return sglang_er::simt::reduce(value ? 1u << lane : 0u, [](uint32_t a, uint32_t b) { return a | b; });
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  return sglang_er::simt::reduce(value, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}
inline int __reduce_add_sync(unsigned, int value) {
  return sglang_er::simt::reduce(value, [](int a, int b) { return a + b; });
}
