// Quantizes slots of a KV pool into its shadow. Bound: memory; a slot's keys and values are read once. A
// thread takes whole slots, one key or value of one head at a time in fp32 on its stack.
//
// Included by one translation unit per instruction set; everything is local to it (anonymous namespace).
#pragma once

#include <cstdint>
#include <type_traits>

#include "kv_shadow_op.h"
#include "parallel.h"
#include "rotation.h"
#include "sglang_er/bfloat16.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kMaxDim = 256;
inline constexpr float kSmallestScale = 0x1p-126f;

// row = the first dim values in fp32, zero up to a multiple of sixteen.
template <class T>
SGLANG_ER_INLINE void load_row(const T* values, int dim, float* row) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(row + d, load(values + d));
  if (d < dim) store(row + d, load_first(values + d, dim - d));
}

// Replaces a row by its levels, in [low, high], and returns the scale: bf16 bits.
SGLANG_ER_INLINE uint16_t quantize_row(float* row, int dim, float steps, float shift, float low, float high) {
  Floats most = zero();
  for (int d = 0; d < dim; d += kLanes) most = max(most, abs(load(row + d)));
  const float rounded = bf16_to_float(float_to_bf16(reduce_max(most) / steps));
  const float scale = rounded > kSmallestScale ? rounded : kSmallestScale;
  const Floats inverse = broadcast(1.0f / scale);
  for (int d = 0; d < dim; d += kLanes) {
    const Floats level = round(add(mul(load(row + d), inverse), broadcast(shift)));
    store(row + d, min(max(level, broadcast(low)), broadcast(high)));
  }
  return float_to_bf16(scale);
}

SGLANG_ER_INLINE uint8_t nibbles(float low, float high) {
  return static_cast<uint8_t>(static_cast<int>(low) | static_cast<int>(high) << 4);
}

template <class T>
void store_slot(const KvShadowStoreCall& call, int64_t slot) {
  alignas(64) float row[kMaxDim];
  for (int head = 0; head < call.kv_heads; ++head) {
    const int64_t index = slot * call.kv_heads + head;
    const int dim = call.head_dim, value_dim = call.value_dim;
    const T* key = static_cast<const T*>(call.keys) + slot * call.key_stride + int64_t{head} * dim;
    const T* value =
        static_cast<const T*>(call.values) + slot * call.value_stride + int64_t{head} * value_dim;
    if (call.bits == 8) {
      const auto store_int8 = [&](const T* source, int size, void* out, uint16_t* scales) {
        load_row(source, size, row);
        scales[index] = quantize_row(row, size, 127.0f, 0.0f, -127.0f, 127.0f);
        int8_t* levels = static_cast<int8_t*>(out) + index * size;
        for (int d = 0; d < size; ++d) levels[d] = static_cast<int8_t>(row[d]);
      };
      store_int8(key, dim, call.shadow_keys, call.key_scales);
      store_int8(value, value_dim, call.shadow_values, call.value_scales);
      continue;
    }
    load_row(key, dim, row);
    rotate(row, dim);
    call.key_scales[index] = quantize_row(row, dim, 8.0f, 7.5f, 0.0f, 15.0f);
    uint8_t* bytes = static_cast<uint8_t*>(call.shadow_keys) + index * (dim / 2);
    for (int i = 0; i < dim / 2; ++i) bytes[i] = nibbles(row[2 * i], row[2 * i + 1]);

    load_row(value, value_dim, row);
    call.value_scales[index] = quantize_row(row, value_dim, 8.0f, 7.5f, 0.0f, 15.0f);
    bytes = static_cast<uint8_t*>(call.shadow_values) + index * (value_dim / 2);
    for (int d = 0; d < value_dim; d += 2 * kLanes, bytes += kLanes) {
      for (int i = 0; i < kLanes; ++i) bytes[i] = nibbles(row[d + i], row[d + kLanes + i]);
    }
  }
}

SGLANG_ER_INLINE void run_kv_shadow_store(const KvShadowStoreCall& call) {
  const int64_t slot_bytes =
      int64_t{call.kv_heads} * (call.head_dim + call.value_dim) * element_bytes(call.kv_type);
  parallel_for(call.count, threads_for(call.threads, call.count * slot_bytes), [&](int64_t i) {
    with_type(call.kv_type,
              [&](auto* type) { store_slot<std::remove_pointer_t<decltype(type)>>(call, call.slots[i]); });
  });
}

}  // namespace
}  // namespace sglang_er::cpu
