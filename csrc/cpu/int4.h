// Two 4-bit levels in a byte, and sixteen bytes of them as fp32 lanes.
#pragma once

#include "vec.h"

namespace sglang_er::cpu {
namespace {

// Two levels n, each the value n - 7.5 (kv_shadow.h).
struct Int4 {
  uint8_t pair;
};

#if defined(__AVX512F__)

// vpermps reads the low 4 bits of a lane as an index: a table of the levels needs no mask and no conversion.
SGLANG_ER_INLINE Floats levels(__m512i nibbles) {
  const __m512 table = _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f,
                                      2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f);
  return {_mm512_permutexvar_ps(nibbles, table)};
}
// The low and the high levels of sixteen bytes.
SGLANG_ER_INLINE void load_levels(const Int4* pairs, Floats& low, Floats& high) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)));
  low = levels(bytes);
  high = levels(_mm512_srli_epi32(bytes, 4));
}

#elif defined(__AVX2__)

SGLANG_ER_INLINE __m256 levels(__m256i nibbles) {
  const __m256i low = _mm256_and_si256(nibbles, _mm256_set1_epi32(15));
  return _mm256_sub_ps(_mm256_cvtepi32_ps(low), _mm256_set1_ps(7.5f));
}
// The low and the high levels of sixteen bytes.
SGLANG_ER_INLINE void load_levels(const Int4* pairs, Floats& low, Floats& high) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs));
  const __m256i first = _mm256_cvtepu8_epi32(bytes), last = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
  low = {levels(first), levels(last)};
  high = {levels(_mm256_srli_epi32(first, 4)), levels(_mm256_srli_epi32(last, 4))};
}

#else

SGLANG_ER_INLINE float level(uint32_t nibble) {
  return static_cast<float>(static_cast<int>(nibble & 15)) - 7.5f;
}
// The low and the high levels of sixteen bytes.
SGLANG_ER_INLINE void load_levels(const Int4* pairs, Floats& low, Floats& high) {
  low = each_lane([&](int i) { return level(pairs[i].pair); });
  high = each_lane([&](int i) { return level(pairs[i].pair >> 4); });
}

#endif

}  // namespace
}  // namespace sglang_er::cpu
