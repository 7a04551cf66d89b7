// Element types of activations, weights and outputs, and their conversion to and from float.
#pragma once

#include <cstdint>

#include "sglang_er/bfloat16.h"
#include "sglang_er/macros.h"

namespace sglang_er::cpu {

enum class DType : int { kBFloat16, kFloat16, kFloat32 };

SGLANG_ER_INLINE int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};

SGLANG_ER_INLINE float to_float(BFloat16 value) { return bf16_to_float(value.bits); }
SGLANG_ER_INLINE float to_float(_Float16 value) { return static_cast<float>(value); }
SGLANG_ER_INLINE float to_float(float value) { return value; }

SGLANG_ER_INLINE void store_float(BFloat16* out, float value) { out->bits = float_to_bf16(value); }
SGLANG_ER_INLINE void store_float(_Float16* out, float value) { *out = static_cast<_Float16>(value); }
SGLANG_ER_INLINE void store_float(float* out, float value) { *out = value; }

// Calls fn with a null pointer of the element type that `dtype` names.
template <class Fn>
[[gnu::always_inline]] inline void with_type(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      return fn(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return fn(static_cast<_Float16*>(nullptr));
    case DType::kFloat32:
      return fn(static_cast<float*>(nullptr));
  }
}

}  // namespace sglang_er::cpu
