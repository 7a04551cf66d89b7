// bf16_linear of bf16 weights with vdpbf16ps: twice the products of an FMA, no conversion of W. x is rounded
// to bf16 once (to nearest even), which changes nothing where it is bf16. Denormals count as zero.
#include "bf16_linear_avx512.h"

namespace sglang_er::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool kDot = true;
  static constexpr int kMaxTile = 14;
  static constexpr int rows_at_once(int tile) { return tile > 4 ? 2 : 4; }  // at most 28 sums
  // These are AMD's (isa.cpp), which keep up with one row of x by themselves: on a Zen 5 two threads read 80
  // GB/s, and 72 with prefetches. With more rows there is time for them.
  static constexpr bool prefetches(int tile) { return tile > 1; }
  static constexpr bool kNear = true;
  static constexpr int lead(int tile, bool whole_rows) { return whole_rows && tile > 4 && tile < 10 ? 3 : 4; }
  // Two rows of 2 KiB at once are two streams in one page, which the hardware's own prefetching does not see
  // through: whole rows in their order gave 5 % at M = 2, 14 % at 5 to 8, nothing at 14.
  static constexpr bool follows(int tile) { return tile <= 12; }
  using Pairs = __m512bh;  // 32 inputs in their order

  SGLANG_ER_INLINE static Pairs load_pairs(const BFloat16* values) {
    auto pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(values));
    asm("" : "+v"(pairs));  // as hold()
    return pairs;
  }
  SGLANG_ER_INLINE static Floats dot(Floats acc, Pairs weights, Pairs inputs) {
    return {_mm512_dpbf16_ps(acc.v, weights, inputs)};
  }
  SGLANG_ER_INLINE static void store_rounded(BFloat16* out, const float* values) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + kLanes), _mm512_loadu_ps(values));
    _mm512_storeu_si512(out, reinterpret_cast<__m512i>(rounded));
  }
};

}  // namespace

void bf16_linear_avx512_bf16(const Bf16LinearCall& call) {
  if (call.weight_type != DType::kBFloat16) return bf16_linear_avx512(call);
  run_bf16_linear<Avx512Bf16>(call);
}

}  // namespace sglang_er::cpu
