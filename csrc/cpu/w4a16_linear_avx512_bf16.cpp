// w4a16_linear for bf16 activations on AVX512-BF16: an operand is 16 rows of a pair of neighbouring inputs,
// as the bf16 values 128 + q. bf16 keeps 8 significant bits, so 0x4300 | q is exactly 128 + q for q in 0..15
// and one logic instruction makes 32 of them. The products and sums are fp32.
#include <immintrin.h>

#include <bit>

#include "w4a16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx512Bf16 {
  using X = uint32_t;  // the bits of x[k] and x[k + 1]
  using Words = __m512i;
  static constexpr int kElements = 4;
  static constexpr int kMaxTile = 8;
  static constexpr float kOffset = 128.0f;
  static constexpr int blocks_at_once(int rows) { return rows <= 4 ? 4 : 2; }

  SGLANG_ER_INLINE static Words load(const uint8_t* packed) { return _mm512_loadu_si512(packed); }
  // s*(sum x*(128 + q)) + (z - 128*s)*(sum x) = s*(sum x*q) + z*(sum x)
  SGLANG_ER_INLINE static Floats shift_zero(Floats zero, Floats scale) {
    return {_mm512_fnmadd_ps(_mm512_set1_ps(kOffset), scale.v, zero.v)};
  }
  SGLANG_ER_INLINE static Floats multiply_add(Floats acc, Words weights, const uint32_t* x) {
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(weights),
                             reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(*x))))};
  }

  template <int R, class Fn>
  SGLANG_ER_INLINE static void for_each_operand(const Words (&raw)[R], Fn&& use) {
    const Words nibble = _mm512_set1_epi16(0x000F);
    const Words offset = _mm512_set1_epi16(0x4300);
    constexpr int kAndOr = 0xEA;  // (a & b) | c
#pragma GCC unroll 4
    for (int operand = 0; operand < kElements; ++operand) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Words bits = operand == 0 ? raw[r] : _mm512_srli_epi32(raw[r], 4 * operand);
        use(operand, r, _mm512_ternarylogic_epi32(bits, nibble, offset, kAndOr));
      }
    }
  }

  SGLANG_ER_INLINE static void fill_operands(const float* values, int group_size, uint32_t* elements,
                                             int stride) {
    for (int word = 0; word < group_size / kWeightsPerWord; ++word) {
      for (int operand = 0; operand < kElements; ++operand) {
        const float* pair = values + nibble_input(group_size, word, 0, operand);
        const uint32_t low = std::bit_cast<uint32_t>(pair[0]) >> 16;  // exact: x was bf16
        const uint32_t high = std::bit_cast<uint32_t>(pair[1]) & 0xFFFF0000u;
        elements[(word * kElements + operand) * stride] = low | high;
      }
    }
  }
};

}  // namespace

void w4a16_linear_avx512_bf16(const W4A16Call& call) { run_w4_linear<W4A16<Avx512Bf16>>(call); }

}  // namespace sglang_er::cpu
