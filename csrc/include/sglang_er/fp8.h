// float8_e4m3fn as bits: conversion from float, rounding to nearest even.
//
// The plain arithmetic of every GPU: only some have an instruction, and where values are stored memory is
// what counts.
#pragma once

#include <bit>
#include <cstdint>

#include "sglang_er/macros.h"

namespace sglang_er {

inline constexpr float kLargestFp8 = 448.0f;

// Beyond 448 the code of 448, for NaN that of 0: no code is NaN.
SGLANG_ER_INLINE uint8_t float_to_fp8(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value == value ? value : 0.0f);
  const uint32_t absolute = bits & 0x7FFFFFFFu, largest = std::bit_cast<uint32_t>(kLargestFp8);
  const uint32_t magnitude = absolute < largest ? absolute : largest;
  uint32_t code;
  if (magnitude < 0x3C800000u) {  // 2^-6: codes count steps of 2^-9, to which adding 2^14 rounds
    code =
        std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - std::bit_cast<uint32_t>(0x1p14f);
  } else {  // three bits of mantissa are kept, and the exponent loses 127 - 7
    code = ((magnitude + 0x7FFFFu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
  }
  return static_cast<uint8_t>(code | (bits >> 24 & 0x80u));
}

}  // namespace sglang_er
