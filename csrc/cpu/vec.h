// Sixteen fp32 lanes as one value: one AVX-512 register, two AVX2 registers, or a plain array.
//
// Kernels written with it are compiled once per instruction set (CMakeLists.txt sets the flags) and give the
// same lanes everywhere up to the rounding of a fused multiply-add, which plain C++ does in two steps.
// Everything is local to the including translation unit (anonymous namespace, always inlined).
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "sglang_er/macros.h"

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace sglang_er::cpu {
namespace {

SGLANG_ER_INLINE Floats load(const BFloat16* values) {
  return load_bf16(reinterpret_cast<const uint16_t*>(values));
}

SGLANG_ER_INLINE void store(BFloat16* out, Floats value) {
  store_bf16(reinterpret_cast<uint16_t*>(out), value);
}

// The first `count` lanes (0..16) from memory, the others zero; nothing past them is touched.
template <class T>
SGLANG_ER_INLINE Floats load_first(const T* values, int count) {
  alignas(64) T padded[kLanes] = {};
  std::memcpy(padded, values, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

SGLANG_ER_INLINE void store_first(float* out, Floats value, int count) {
  alignas(64) float lanes[kLanes];
  store(lanes, value);
  std::memcpy(out, lanes, static_cast<size_t>(count) * sizeof(float));
}

// e^x to 2 ulp for x in [-87, 88]; below -87.3 it gives 0, also for -inf. x must not be NaN or above 88.
// Cody and Waite: x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial of degree 6 (Cephes' expf).
SGLANG_ER_INLINE Floats exp(Floats x) {
  const Floats clamped = max(x, broadcast(-87.33654f));
  const Floats n = round(mul(clamped, broadcast(1.44269504088896341f)));
  Floats r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Floats y = broadcast(1.9875691500e-4f);
  y = fma(y, r, broadcast(1.3981999507e-3f));
  y = fma(y, r, broadcast(8.3334519073e-3f));
  y = fma(y, r, broadcast(4.1665795894e-2f));
  y = fma(y, r, broadcast(1.6666665459e-1f));
  y = fma(y, r, broadcast(5.0000001201e-1f));
  y = fma(y, mul(r, r), add(r, broadcast(1.0f)));
  return zero_below(scale_by_power_of_two(y, n), x, broadcast(-87.33654f));
}

}  // namespace
}  // namespace sglang_er::cpu
