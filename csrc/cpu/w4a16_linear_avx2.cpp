// w4a16_linear with fp32 FMA on AVX2: as on AVX-512, with two 8-lane registers for the 16 rows of a block.
#include <immintrin.h>

#include "w4a16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx2 : OneInput {
  struct Words {
    __m256i low, high;
  };
  static constexpr int kMaxTile = 4;
  static constexpr int blocks_at_once(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }  // 16 registers

  SGLANG_ER_INLINE static Words load(const uint8_t* packed) {
    const auto* halves = reinterpret_cast<const __m256i*>(packed);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }

  template <int R, class Fn>
  SGLANG_ER_INLINE static void for_each_operand(const Words (&raw)[R], Fn&& use) {
    const __m256i mask = _mm256_set1_epi32(15);
    const auto value = [mask](__m256i words, int shift) {
      return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words, shift), mask));
    };
#pragma GCC unroll 8
    for (int operand = 0; operand < kElements; ++operand) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        use(operand, r, Floats{value(raw[r].low, 4 * operand), value(raw[r].high, 4 * operand)});
      }
    }
  }
};

}  // namespace

void w4a16_linear_avx2(const W4A16Call& call) { run_w4_linear<W4A16<Avx2>>(call); }

}  // namespace sglang_er::cpu
