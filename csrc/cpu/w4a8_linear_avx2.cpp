// w4a8_linear on AVX2: vpmaddubsw adds pairs of u8 x s8 products to 16 bits, vpmaddwd pairs of those to 32.
// Widening once a step: a pair is at most 2 * 15 * 127 = 3810, and the 8 that a step adds are at most 30480,
// so that neither the pair nor the 16-bit sum saturates or overflows.
#include <immintrin.h>

#include "w4a8_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx2 {
  struct Acc {
    __m256i low, high;  // lanes 0-7 and 8-15
  };
  static constexpr int kMaxTile = 4;
  static constexpr int blocks_at_once(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }  // 16 registers
  static constexpr int64_t prefetch_bytes(int rows) { return rows <= 2 ? 1024 : 2048; }

  SGLANG_ER_INLINE static Floats to_floats(Acc acc) {
    return {_mm256_cvtepi32_ps(acc.low), _mm256_cvtepi32_ps(acc.high)};
  }
  SGLANG_ER_INLINE static void store_levels(int8_t* levels, Floats rounded) {
    const __m256i pairs =
        _mm256_packs_epi32(_mm256_cvtps_epi32(rounded.low), _mm256_cvtps_epi32(rounded.high));
    const __m256i ordered = _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(levels),
                     _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
  }

  template <int T, int R>
  SGLANG_ER_INLINE static void step(const Streams& streams, const uint32_t* x, Acc (&acc)[T][R]) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(kNibbles));
    Acc sums[T][R];  // 16 bits
#pragma GCC unroll 4
    for (int word = 0; word < kStepWords; ++word) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        prefetch(streams.line(r, word) + streams.ahead);
        const auto* halves = reinterpret_cast<const __m256i*>(streams.line(r, word));
#pragma GCC unroll 2
        for (int high = 0; high < 2; ++high) {
          const auto nibbles = [&](const __m256i* half) {
            const __m256i raw = _mm256_loadu_si256(half);
            return _mm256_and_si256(high == 0 ? raw : _mm256_srli_epi32(raw, 4), mask);
          };
          const __m256i first = nibbles(halves);
          const __m256i second = nibbles(halves + 1);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            const __m256i levels = _mm256_set1_epi32(static_cast<int>(*levels_of(x, t, word, high)));
            const Acc pairs{_mm256_maddubs_epi16(first, levels), _mm256_maddubs_epi16(second, levels)};
            sums[t][r] = word == 0 && high == 0 ? pairs
                                                : Acc{_mm256_add_epi16(sums[t][r].low, pairs.low),
                                                      _mm256_add_epi16(sums[t][r].high, pairs.high)};
          }
        }
      }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    const auto widen = [&](__m256i total, __m256i pairs) {
      return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
    };
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) {
        acc[t][r] = {widen(acc[t][r].low, sums[t][r].low), widen(acc[t][r].high, sums[t][r].high)};
      }
    }
  }
};

}  // namespace

void w4a8_linear_avx2(const W4A8Call& call) { run_w4_linear<W4A8<Avx2>>(call); }

}  // namespace sglang_er::cpu
