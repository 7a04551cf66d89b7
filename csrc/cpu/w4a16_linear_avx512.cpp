// w4a16_linear with fp32 FMA on AVX-512: an operand is 16 rows of one input as fp32.
#include <immintrin.h>

#include "w4a16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx512 {
  using X = float;
  using Lanes = __m512;
  using Words = __m512i;
  static constexpr int kOperands = 8;
  static constexpr int kMaxTile = 8;
  static constexpr int blocks_at_once(int rows) { return rows <= 4 ? 4 : 2; }

  SGLANG_ER_INLINE static Lanes zero() { return _mm512_setzero_ps(); }
  SGLANG_ER_INLINE static Lanes broadcast(float value) { return _mm512_set1_ps(value); }
  SGLANG_ER_INLINE static Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
  SGLANG_ER_INLINE static void store(float* out, Lanes value) { _mm512_storeu_ps(out, value); }
  SGLANG_ER_INLINE static Words load(const uint8_t* packed) { return _mm512_loadu_si512(packed); }
  SGLANG_ER_INLINE static Lanes load_bf16(const uint16_t* values) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  SGLANG_ER_INLINE static Lanes shift_zero(Lanes zero, Lanes) { return zero; }  // operands are q itself
  SGLANG_ER_INLINE static Lanes multiply_add(Lanes acc, Lanes weights, const float* x) {
    return _mm512_fmadd_ps(weights, _mm512_set1_ps(*x), acc);
  }

  // vpermps reads the low 4 bits of a lane as an index: a table of 0..15 turns a nibble into its fp32 value
  // in one instruction, without masking.
  template <int R, class Fn>
  SGLANG_ER_INLINE static void for_each_operand(const Words (&raw)[R], Fn&& use) {
    const Lanes table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 8
    for (int operand = 0; operand < kOperands; ++operand) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Words nibbles = operand == 0 ? raw[r] : _mm512_srli_epi32(raw[r], 4 * operand);
        use(operand, r, _mm512_permutexvar_ps(nibbles, table));
      }
    }
  }

  // Operand 4*h + i is input i*G/4 + 2*word + h: the order of the nibbles in a word.
  SGLANG_ER_INLINE static void fill_group(const float* values, int group_size, float* elements, int stride) {
    for (int word = 0; word < group_size / kWeightsPerWord; ++word) {
      for (int operand = 0; operand < kOperands; ++operand) {
        elements[(word * kOperands + operand) * stride] =
            values[nibble_input(group_size, word, operand / 4, operand % 4)];
      }
    }
  }
};

}  // namespace

void w4a16_linear_avx512(const W4A16Call& call) { run_w4a16_linear<Avx512>(call); }

}  // namespace sglang_er::cpu
