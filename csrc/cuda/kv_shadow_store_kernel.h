// The kernel of kv_shadow_store.cu, which says who computes what.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"
#include "rotation_warp.h"
#include "sglang_er/kv_shadow_quantize.h"

namespace sglang_er::cuda {

inline constexpr int kStoreWarps = 8;

struct ShadowPart {  // keys or values
  const void* pool;
  int64_t stride;  // elements between slots
  int dim;
  bool aligned;  // every lane's elements can be loaded at once
  bool rotated;
  uint8_t* shadow;
  uint16_t* scales;
};

struct KvShadowStoreParams {
  ShadowPart parts[2];
  const int64_t* slots;
  int vectors;
  int64_t pool_slots;
  int kv_heads;
  ShadowFormat format;
  float norm;  // of the rotation of keys
};

template <int Bytes>
struct Chunk;
template <>
struct Chunk<1> {
  using Type = uint8_t;
};
template <>
struct Chunk<2> {
  using Type = uint16_t;
};
template <>
struct Chunk<4> {
  using Type = uint32_t;
};
template <>
struct Chunk<8> {
  using Type = uint64_t;
};
template <>
struct Chunk<16> {
  using Type = uint4;
};

template <int Bytes, class Word>
__device__ __forceinline__ void store_bytes(uint8_t* out, Word word) {
  using Type = typename Chunk<Bytes>::Type;
  *reinterpret_cast<Type*>(out) = static_cast<Type>(word);
}

template <class T, int E>
__device__ __forceinline__ void load_lane(const T* vector, int lane, bool aligned, float (&x)[E]) {
  T loaded[E];
  const T* first = vector + lane * E;
  if (aligned) {
    const auto chunk = *reinterpret_cast<const typename Chunk<E * 2>::Type*>(first);
    memcpy(loaded, &chunk, sizeof(chunk));
  } else {
#pragma unroll
    for (int i = 0; i < E; ++i) loaded[i] = first[i];
  }
#pragma unroll
  for (int i = 0; i < E; ++i) x[i] = to_float(loaded[i]);
}

template <class T, int E>
__global__ void __launch_bounds__(kStoreWarps* kWarpLanes)
    kv_shadow_store_kernel(const __grid_constant__ KvShadowStoreParams params) {
  const int lane = threadIdx.x % kWarpLanes;
  const int vector = static_cast<int>(blockIdx.x * kStoreWarps + threadIdx.x / kWarpLanes);
  if (vector >= params.vectors) return;
  const int head = vector % params.kv_heads, row = vector / params.kv_heads;
  const int64_t slot = params.slots[row / 2];
  if (slot < 0 || slot >= params.pool_slots) return;
  const ShadowPart& part = params.parts[row % 2];
  const int dim = part.dim;
  const int64_t index = slot * params.kv_heads + head;

  float x[E] = {};
  const bool inside = lane * E < dim;
  if (inside) {
    const T* pool = static_cast<const T*>(part.pool) + slot * part.stride + int64_t{head} * dim;
    load_lane<T, E>(pool, lane, part.aligned, x);
  }
  if (part.rotated) rotate_in_warp<E>(x, rotation_block(dim), params.norm, lane);

  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < E; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));

  const uint16_t scale = shadow_scale_bits(largest, params.format);
  const float inverse = shadow_inverse_scale(scale);
  if (lane == 0) part.scales[index] = scale;
  int levels[E];
#pragma unroll
  for (int i = 0; i < E; ++i) levels[i] = shadow_level(x[i], inverse, params.format);

  uint8_t* out = part.shadow + index * level_bytes_of(dim, params.format);
  if (params.format != ShadowFormat::kInt4) {
    if (inside) store_bytes<E>(out + lane * E, level_bytes<E>(levels));
  } else if (part.rotated) {
    if (inside) store_bytes<E / 2>(out + lane * (E / 2), key_nibbles<E>(levels));
  } else {
    const uint64_t own = level_bytes<E>(levels);
    const uint64_t partner = __shfl_xor_sync(0xFFFFFFFFu, own, value_partner<E>());
    if (inside && writes_value<E>(lane))
      store_bytes<E>(out + value_byte<E>(lane), value_nibbles(own, partner));
  }
}

}  // namespace sglang_er::cuda
