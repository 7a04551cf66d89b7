// w4a16_linear in plain C++: loops over 16 lanes that any compiler can map to its vectors.
#include "w4a16_linear.h"

namespace sglang_er::cpu {
namespace {

struct Portable {
  using X = float;
  struct Lanes {
    float lane[kRowBlock];
  };
  struct Words {
    uint32_t lane[kRowBlock];
  };
  static constexpr int kOperands = 8;
  static constexpr int kMaxTile = 2;  // more accumulators than SSE2 registers spill, tenfold slower
  static constexpr int blocks_at_once(int) { return 1; }

  SGLANG_ER_INLINE static Lanes zero() { return {}; }
  SGLANG_ER_INLINE static Lanes broadcast(float value) {
    Lanes lanes;
    for (float& lane : lanes.lane) lane = value;
    return lanes;
  }
  SGLANG_ER_INLINE static Lanes fma(const Lanes& a, const Lanes& b, Lanes c) {
    for (int i = 0; i < kRowBlock; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  SGLANG_ER_INLINE static void store(float* out, const Lanes& value) {
    std::memcpy(out, value.lane, sizeof(value.lane));
  }
  SGLANG_ER_INLINE static Words load(const uint8_t* packed) {
    Words words;
    std::memcpy(words.lane, packed, sizeof(words.lane));
    return words;
  }
  SGLANG_ER_INLINE static Lanes load_bf16(const uint16_t* values) {
    Lanes lanes;
    for (int i = 0; i < kRowBlock; ++i) lanes.lane[i] = bf16_to_float(values[i]);
    return lanes;
  }
  SGLANG_ER_INLINE static Lanes shift_zero(const Lanes& zero, const Lanes&) { return zero; }
  SGLANG_ER_INLINE static Lanes multiply_add(Lanes acc, const Lanes& weights, const float* x) {
    for (int i = 0; i < kRowBlock; ++i) acc.lane[i] += weights.lane[i] * *x;
    return acc;
  }

  template <int R, class Fn>
  SGLANG_ER_INLINE static void for_each_operand(const Words (&raw)[R], Fn&& use) {
    for (int operand = 0; operand < kOperands; ++operand) {
      for (int r = 0; r < R; ++r) {
        Lanes weights;
        for (int i = 0; i < kRowBlock; ++i) {
          weights.lane[i] = static_cast<float>(static_cast<int>(raw[r].lane[i] >> (4 * operand) & 15u));
        }
        use(operand, r, weights);
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

void w4a16_linear_portable(const W4A16Call& call) { run_w4a16_linear<Portable>(call); }

}  // namespace sglang_er::cpu
