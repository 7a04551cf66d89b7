// In the place of CUDA's own.
#pragma once

#include <bit>
#include <cstdint>

struct __half {
  uint16_t bits;
};
inline __half __float2half_rn(float value) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(value))}; }
inline float __half2float(__half value) { return static_cast<float>(std::bit_cast<_Float16>(value.bits)); }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
