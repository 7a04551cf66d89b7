// bfloat16 as bits: conversion to and from float, rounding to nearest even. NaN stays NaN.
#pragma once

#include <bit>
#include <cstdint>

#include "sglang_er/macros.h"

namespace sglang_er {

SGLANG_ER_INLINE float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

SGLANG_ER_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

}  // namespace sglang_er
