// What w4a8_linear's forms for AVX-512 and for tiles share.
#pragma once

#include <immintrin.h>

#include "w4a8_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx512Levels {
  using Acc = __m512i;

  SGLANG_ER_INLINE static Floats to_floats(Acc acc) { return {_mm512_cvtepi32_ps(acc)}; }
  SGLANG_ER_INLINE static void store_levels(int8_t* levels, Floats rounded) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(levels), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(rounded.v)));
  }
};

}  // namespace
}  // namespace sglang_er::cpu
