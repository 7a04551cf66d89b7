// w4a8_linear on AVX512-VNNI: vpdpbusd adds four u8 x s8 products to each of 16 lanes, x broadcast from
// memory. 64 products an instruction, where an fp32 FMA makes 16.
#include <immintrin.h>

#include "w4a8_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx512Vnni {
  using Acc = __m512i;
  static constexpr int kMaxTile = 8;
  static constexpr int blocks_at_once(int rows) { return rows <= 4 ? 4 : 2; }

  SGLANG_ER_INLINE static Floats to_floats(Acc acc) { return {_mm512_cvtepi32_ps(acc)}; }
  SGLANG_ER_INLINE static void store_levels(int8_t* levels, Floats rounded) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(levels), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(rounded.v)));
  }

  template <int T, int R>
  SGLANG_ER_INLINE static void step(const Streams& streams, const uint32_t* x, Acc (&acc)[T][R]) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(kNibbles));
#pragma GCC unroll 4
    for (int word = 0; word < kStepWords; ++word) {
      __m512i nibbles[2][R];
      for (int r = 0; r < R; ++r) {
        prefetch(streams.line(r, word) + streams.ahead);
        const __m512i raw = _mm512_loadu_si512(streams.line(r, word));
        nibbles[0][r] = _mm512_and_si512(raw, mask);
        nibbles[1][r] = _mm512_and_si512(_mm512_srli_epi32(raw, 4), mask);
      }
#pragma GCC unroll 2
      for (int high = 0; high < 2; ++high) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const __m512i levels = _mm512_set1_epi32(static_cast<int>(*levels_of(x, t, word, high)));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[t][r] = _mm512_dpbusd_epi32(acc[t][r], nibbles[high][r], levels);
        }
      }
    }
  }
};

}  // namespace

void w4a8_linear_avx512_vnni(const W4A8Call& call) { run_w4_linear<W4A8<Avx512Vnni>>(call); }

}  // namespace sglang_er::cpu
