// w4a16_linear with fp32 FMA on AVX2: as on AVX-512, with two 8-lane registers for the 16 rows of a block.
#include <immintrin.h>

#include "w4a16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx2 {
  using X = float;
  struct Lanes {
    __m256 low, high;
  };
  struct Words {
    __m256i low, high;
  };
  static constexpr int kOperands = 8;
  static constexpr int kMaxTile = 4;
  static constexpr int blocks_at_once(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }  // 16 registers

  SGLANG_ER_INLINE static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  SGLANG_ER_INLINE static Lanes broadcast(float value) {
    return {_mm256_set1_ps(value), _mm256_set1_ps(value)};
  }
  SGLANG_ER_INLINE static Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  SGLANG_ER_INLINE static void store(float* out, Lanes value) {
    _mm256_storeu_ps(out, value.low);
    _mm256_storeu_ps(out + 8, value.high);
  }
  SGLANG_ER_INLINE static Words load(const uint8_t* packed) {
    const auto* halves = reinterpret_cast<const __m256i*>(packed);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  SGLANG_ER_INLINE static Lanes load_bf16(const uint16_t* values) {
    const auto* halves = reinterpret_cast<const __m128i*>(values);
    const auto widen = [](__m128i bits) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    };
    return {widen(_mm_loadu_si128(halves)), widen(_mm_loadu_si128(halves + 1))};
  }
  SGLANG_ER_INLINE static Lanes shift_zero(Lanes zero, Lanes) { return zero; }
  SGLANG_ER_INLINE static Lanes multiply_add(Lanes acc, Lanes weights, const float* x) {
    return fma(weights, broadcast(*x), acc);
  }

  template <int R, class Fn>
  SGLANG_ER_INLINE static void for_each_operand(const Words (&raw)[R], Fn&& use) {
    const __m256i mask = _mm256_set1_epi32(15);
    const auto value = [mask](__m256i words, int shift) {
      return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words, shift), mask));
    };
#pragma GCC unroll 8
    for (int operand = 0; operand < kOperands; ++operand) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        use(operand, r, Lanes{value(raw[r].low, 4 * operand), value(raw[r].high, 4 * operand)});
      }
    }
  }

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

void w4a16_linear_avx2(const W4A16Call& call) { run_w4a16_linear<Avx2>(call); }

}  // namespace sglang_er::cpu
