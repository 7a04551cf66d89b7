// bf16_linear with fp32 FMA on AVX2: sixteen lanes are two registers.
#include <immintrin.h>

#include "bf16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Avx2 {
  static constexpr bool kDot = false;
  static constexpr int kMaxTile = 3;
  static constexpr int rows_at_once(int tile) { return tile == 1 ? 4 : 2; }  // sums: 8, 8, 12 of 16 registers
  static constexpr bool prefetches(int) { return true; }
  static constexpr bool kNear = false;
  static constexpr bool unrolls(int) { return false; }  // GCC would keep sums on the stack: 25 % at 8 rows
  static constexpr int64_t kStripeRows = 16;

  SGLANG_ER_INLINE static __m256i words(const BFloat16* weights) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
  }
  SGLANG_ER_INLINE static __m256 low(__m256i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  }
  SGLANG_ER_INLINE static __m256 high(__m256i words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-0x10000)));
  }

  // Little-endian: in a word of two bf16 the even input is the low half.
  SGLANG_ER_INLINE static Floats even(const BFloat16* weights) {
    return {low(words(weights)), low(words(weights + 16))};
  }
  SGLANG_ER_INLINE static Floats odd(const BFloat16* weights) {
    return {high(words(weights)), high(words(weights + 16))};
  }
  SGLANG_ER_INLINE static void hold(Floats&) {}
};

}  // namespace

void bf16_linear_avx2(const Bf16LinearCall& call) { run_bf16_linear<Avx2>(call); }

}  // namespace sglang_er::cpu
