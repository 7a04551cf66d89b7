// w4a16_linear in plain C++: loops over 16 lanes that any compiler can map to its vectors.
#include "w4a16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Portable : OneInput {
  struct Words {
    uint32_t lane[kRowBlock];
  };
  static constexpr int kMaxTile = 2;  // more accumulators than SSE2 registers spill, tenfold slower
  static constexpr int blocks_at_once(int) { return 1; }

  SGLANG_ER_INLINE static Words load(const uint8_t* packed) {
    Words words;
    std::memcpy(words.lane, packed, sizeof(words.lane));
    return words;
  }

  template <int R, class Fn>
  SGLANG_ER_INLINE static void for_each_operand(const Words (&raw)[R], Fn&& use) {
    for (int operand = 0; operand < kElements; ++operand) {
      for (int r = 0; r < R; ++r) {
        Floats weights;
        for (int i = 0; i < kRowBlock; ++i) {
          weights.lane[i] = static_cast<float>(static_cast<int>(raw[r].lane[i] >> (4 * operand) & 15u));
        }
        use(operand, r, weights);
      }
    }
  }
};

}  // namespace

void w4a16_linear_portable(const W4A16Call& call) { run_w4_linear<W4A16<Portable>>(call); }

}  // namespace sglang_er::cpu
