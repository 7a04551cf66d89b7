// The operations of layer_ops_op.h on sixteen lanes. Bound: latency at one token (microseconds in all), cache
// bandwidth at many. A thread takes whole tokens.
//
// Included by one translation unit per instruction set; everything is local to it (anonymous namespace).
#pragma once

#include <cmath>
#include <type_traits>

#include "layer_ops_op.h"
#include "parallel.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

// Calls fn(first, count) for every lane group of [0, size): count is kLanes but for the last one.
template <class Fn>
SGLANG_ER_INLINE void for_lanes(int64_t size, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) fn(i, std::integral_constant<int, kLanes>{});
  if (i < size) fn(i, static_cast<int>(size - i));
}

template <class T, class Count>
SGLANG_ER_INLINE Floats load_count(const T* values, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    return load_first(values, count);
  } else {
    return load(values);
  }
}

template <class Count>
SGLANG_ER_INLINE void store_count(float* out, Floats value, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    store_first(out, value, count);
  } else {
    store(out, value);
  }
}

// 1 / rms of x[size]. Four partial sums: the additions of one would wait for each other.
SGLANG_ER_INLINE float inverse_rms(const float* x, int64_t size, float eps) {
  Floats partial[4] = {zero(), zero(), zero(), zero()};
  for_lanes(size, [&](int64_t i, auto count) {
    Floats& target = partial[(i / kLanes) % 4];
    const Floats value = load_count(x + i, count);
    target = fma(value, value, target);
  });
  const float squares = sum(add(add(partial[0], partial[1]), add(partial[2], partial[3])));
  return 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
}

template <class W>
SGLANG_ER_INLINE void normalize(const float* x, const W* weight, int64_t size, float eps, float* out) {
  const Floats factor = broadcast(inverse_rms(x, size, eps));
  for_lanes(size, [&](int64_t i, auto count) {
    const Floats scaled = mul(load_count(x + i, count), factor);
    store_count(out + i, mul(scaled, load_count(weight + i, count)), count);
  });
}

void add_rms_norm(const AddRmsNormCall& call) {
  const auto token = [&](int64_t t) {
    float* hidden = call.hidden + t * call.size;
    if (call.delta != nullptr) {
      const float* delta = call.delta + t * call.size;
      for_lanes(call.size, [&](int64_t i, auto count) {
        store_count(hidden + i, add(load_count(hidden + i, count), load_count(delta + i, count)), count);
      });
    }
    with_type(call.weight_type, [&](auto* type) {
      const auto* weight = static_cast<decltype(type)>(const_cast<void*>(call.weight));
      normalize(hidden, weight, call.size, call.eps, call.out + t * call.size);
    });
  };
  parallel_for(call.tokens, threads_for(call.threads, call.tokens * call.size * 4), token);
}

// One head in place; cosines and sines are fp32 [rotary_dim / 2] each.
SGLANG_ER_INLINE void rotate_head(float* head, const float* cosines, const float* sines, int half,
                                  bool neox) {
  if (!neox) {
    for (int i = 0; i < half; ++i) {
      const float x = head[2 * i];
      const float y = head[2 * i + 1];
      head[2 * i] = x * cosines[i] - y * sines[i];
      head[2 * i + 1] = y * cosines[i] + x * sines[i];
    }
    return;
  }
  for_lanes(half, [&](int64_t i, auto count) {
    const Floats x = load_count(head + i, count);
    const Floats y = load_count(head + half + i, count);
    const Floats c = load_count(cosines + i, count);
    const Floats s = load_count(sines + i, count);
    store_count(head + i, sub(mul(x, c), mul(y, s)), count);
    store_count(head + half + i, add(mul(y, c), mul(x, s)), count);
  });
}

constexpr int kMaxRotaryDim = 512;

void rotate_and_store_token(const RotateAndStoreCall& call, int64_t t) {
  const int heads = call.q_heads + 2 * call.kv_heads;
  const int dim = call.head_dim;
  const int half = call.rotary_dim / 2;
  float* qkv = call.qkv + t * heads * dim;
  float angles[kMaxRotaryDim];
  with_type(call.cos_sin_type, [&](auto* type) {
    const auto* row =
        static_cast<decltype(type)>(const_cast<void*>(call.cos_sin)) + call.positions[t] * call.rotary_dim;
    for (int i = 0; i < call.rotary_dim; ++i) angles[i] = to_float(row[i]);
  });
  for (int head = 0; head < call.q_heads + call.kv_heads; ++head) {
    float* x = qkv + head * dim;
    const void* weight = head < call.q_heads ? call.q_norm : call.k_norm;
    if (weight != nullptr) {
      with_type(call.norm_type, [&](auto* type) {
        normalize(x, static_cast<decltype(type)>(const_cast<void*>(weight)), dim, call.eps, x);
      });
    }
    rotate_head(x, angles, angles + half, half, call.neox);
  }
  if (call.shadow_valid != nullptr) call.shadow_valid[call.slots[t]] = 0;
  with_type(call.kv_type, [&](auto* type) {
    const int64_t size = int64_t{call.kv_heads} * dim;
    const float* k = qkv + call.q_heads * dim;
    auto* keys = static_cast<decltype(type)>(call.keys) + call.slots[t] * call.key_stride;
    auto* values = static_cast<decltype(type)>(call.values) + call.slots[t] * call.value_stride;
    for (int64_t i = 0; i < size; ++i) store_float(keys + i, k[i]);
    for (int64_t i = 0; i < size; ++i) store_float(values + i, k[size + i]);
  });
}

void rotate_and_store(const RotateAndStoreCall& call) {
  const int64_t bytes = call.tokens * (call.q_heads + 2 * call.kv_heads) * call.head_dim * 8;
  parallel_for(call.tokens, threads_for(call.threads, bytes),
               [&](int64_t t) { rotate_and_store_token(call, t); });
}

void silu_and_mul(const SiluAndMulCall& call) {
  const auto token = [&](int64_t t) {
    const float* gate = call.gate_up + t * 2 * call.size;
    const float* up = gate + call.size;
    float* out = call.out + t * call.size;
    for_lanes(call.size, [&](int64_t i, auto count) {
      const Floats x = load_count(gate + i, count);
      // exp's range ends at 88; there silu is 0 to fp32's last digit anyway.
      const Floats e = exp(min(sub(zero(), x), broadcast(88.0f)));
      const Floats silu = div(x, add(e, broadcast(1.0f)));
      store_count(out + i, mul(silu, load_count(up + i, count)), count);
    });
  };
  parallel_for(call.tokens, threads_for(call.threads, call.tokens * call.size * 8), token);
}

constexpr LayerOps kLayerOps{add_rms_norm, rotate_and_store, silu_and_mul};

}  // namespace
}  // namespace sglang_er::cpu
