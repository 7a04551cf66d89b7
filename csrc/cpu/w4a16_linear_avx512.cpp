// w4a16_linear with fp32 FMA on AVX-512: an operand is 16 rows of one input as fp32.
#include <immintrin.h>

#include "w4a16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx512 : OneInput {
  using Words = __m512i;
  static constexpr int kMaxTile = 8;
  static constexpr int blocks_at_once(int rows) { return rows <= 4 ? 4 : 2; }

  SGLANG_ER_INLINE static Words load(const uint8_t* packed) { return _mm512_loadu_si512(packed); }

  // vpermps reads the low 4 bits of a lane as an index: a table of 0..15 turns a nibble into its fp32 value
  // in one instruction, without masking.
  template <int R, class Fn>
  SGLANG_ER_INLINE static void for_each_operand(const Words (&raw)[R], Fn&& use) {
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 8
    for (int operand = 0; operand < kElements; ++operand) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Words nibbles = operand == 0 ? raw[r] : _mm512_srli_epi32(raw[r], 4 * operand);
        use(operand, r, Floats{_mm512_permutexvar_ps(nibbles, table)});
      }
    }
  }
};

}  // namespace

void w4a16_linear_avx512(const W4A16Call& call) { run_w4_linear<W4A16<Avx512>>(call); }

}  // namespace sglang_er::cpu
