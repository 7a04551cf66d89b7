// vec.h in plain C++: loops over 16 lanes that any compiler can map to its vectors.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "dtype.h"
#include "sglang_er/bfloat16.h"
#include "sglang_er/macros.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kLanes = 16;

struct Floats {
  float lane[kLanes];
};

template <class Fn>
SGLANG_ER_INLINE Floats each_lane(const Fn& fn) {
  Floats out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = fn(i);
  return out;
}

SGLANG_ER_INLINE Floats zero() { return {}; }
SGLANG_ER_INLINE Floats broadcast(float value) {
  return each_lane([=](int) { return value; });
}
SGLANG_ER_INLINE Floats load(const float* values) {
  return each_lane([=](int i) { return values[i]; });
}
SGLANG_ER_INLINE Floats load(const _Float16* values) {
  return each_lane([=](int i) { return to_float(values[i]); });
}
SGLANG_ER_INLINE Floats load_bf16(const uint16_t* values) {
  return each_lane([=](int i) { return bf16_to_float(values[i]); });
}
SGLANG_ER_INLINE Floats load(const int8_t* values) {
  return each_lane([=](int i) { return static_cast<float>(values[i]); });
}
SGLANG_ER_INLINE void store(float* out, const Floats& value) {
  std::memcpy(out, value.lane, sizeof(value.lane));
}
SGLANG_ER_INLINE void store(_Float16* out, const Floats& value) {
  for (int i = 0; i < kLanes; ++i) store_float(out + i, value.lane[i]);
}
SGLANG_ER_INLINE void store_bf16(uint16_t* out, const Floats& value) {
  for (int i = 0; i < kLanes; ++i) out[i] = float_to_bf16(value.lane[i]);
}

SGLANG_ER_INLINE Floats add(const Floats& a, const Floats& b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
SGLANG_ER_INLINE Floats sub(const Floats& a, const Floats& b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
SGLANG_ER_INLINE Floats mul(const Floats& a, const Floats& b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
SGLANG_ER_INLINE Floats div(const Floats& a, const Floats& b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
SGLANG_ER_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
SGLANG_ER_INLINE Floats max(const Floats& a, const Floats& b) {
  return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
SGLANG_ER_INLINE Floats min(const Floats& a, const Floats& b) {
  return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
SGLANG_ER_INLINE Floats abs(const Floats& a) {
  return each_lane([&](int i) { return std::fabs(a.lane[i]); });
}
// Adding and taking back 1.5 * 2^23 rounds to the nearest integer, ties to even, for |a| < 2^22.
SGLANG_ER_INLINE Floats round(const Floats& a) {
  constexpr float kShift = 12582912.0f;
  return each_lane([&](int i) { return (a.lane[i] + kShift) - kShift; });
}

// value * 2^n for integral n in [-126, 127].
SGLANG_ER_INLINE Floats scale_by_power_of_two(const Floats& value, const Floats& n) {
  return each_lane([&](int i) {
    const auto exponent = static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127);
    return value.lane[i] * std::bit_cast<float>(exponent << 23);
  });
}
// value, but 0 in the lanes where x < limit.
SGLANG_ER_INLINE Floats zero_below(const Floats& value, const Floats& x, const Floats& limit) {
  return each_lane([&](int i) { return x.lane[i] < limit.lane[i] ? 0.0f : value.lane[i]; });
}

// Horizontal: the order of additions is fixed and the same on every instruction set (halves, quarters, ...).
SGLANG_ER_INLINE float sum(Floats a) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
  }
  return a.lane[0];
}
SGLANG_ER_INLINE float reduce_max(const Floats& a) {
  float largest = a.lane[0];
  for (int i = 1; i < kLanes; ++i) largest = a.lane[i] > largest ? a.lane[i] : largest;
  return largest;
}

}  // namespace
}  // namespace sglang_er::cpu
