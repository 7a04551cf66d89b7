// bf16_linear in plain C++: the loops over 16 lanes of vec_portable.h.
#include <bit>
#include <cstring>

#include "bf16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Portable {
  static constexpr bool kDot = false;
  static constexpr int kMaxTile = 2;
  static constexpr int rows_at_once(int) { return 1; }
  static constexpr bool prefetches(int) { return true; }
  static constexpr bool kNear = false;
  static constexpr bool unrolls(int) { return false; }
  static constexpr int64_t kStripeRows = 16;

  SGLANG_ER_INLINE static Floats even(const BFloat16* weights) {
    return each_lane([=](int i) { return to_float(weights[2 * i]); });
  }
  SGLANG_ER_INLINE static Floats odd(const BFloat16* weights) {
    return each_lane([=](int i) { return to_float(weights[2 * i + 1]); });
  }
  SGLANG_ER_INLINE static void hold(Floats&) {}
};

}  // namespace

void bf16_linear_portable(const Bf16LinearCall& call) { run_bf16_linear<Portable>(call); }

}  // namespace sglang_er::cpu
