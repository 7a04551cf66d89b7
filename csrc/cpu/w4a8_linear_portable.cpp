// w4a8_linear in plain C++ with the compiler's 128-bit vectors, in 16-bit arithmetic: a word is two 16-bit
// halves of four nibbles each. A half meets 4 inputs a word and 16 a step: at most 16 * 15 * 127 = 30480,
// which fits.
#include <bit>

#include "w4a8_linear.h"

namespace sglang_er::cpu {
namespace {

using Halves = int16_t __attribute__((vector_size(16)));
using UnsignedHalves = uint16_t __attribute__((vector_size(16)));
using Words = int32_t __attribute__((vector_size(16)));

constexpr int kVectors = kWordBytes / sizeof(Words);  // in a line of 16 rows
constexpr int kVectorRows = kRowBlock / kVectors;

struct Portable {
  struct Acc {
    Words rows[kVectors];
  };
  static constexpr int kMaxTile = 2;
  static constexpr int blocks_at_once(int) { return 1; }
  static constexpr int64_t prefetch_bytes(int) { return 1024; }

  SGLANG_ER_INLINE static Floats to_floats(const Acc& acc) {
    return each_lane([&](int i) { return static_cast<float>(acc.rows[i / kVectorRows][i % kVectorRows]); });
  }
  // Adding 1.5 * 2^23 leaves the level in the low bits; unlike a conversion this is defined for NaN too.
  SGLANG_ER_INLINE static void store_levels(int8_t* levels, const Floats& rounded) {
    for (int i = 0; i < kLanes; ++i) {
      levels[i] = static_cast<int8_t>(std::bit_cast<uint32_t>(rounded.lane[i] + 12582912.0f) & 0xFFu);
    }
  }

  // The levels of one position: those of the two halves of a word, in every word of a vector.
  SGLANG_ER_INLINE static Halves broadcast_levels(uint32_t levels, int byte) {
    const auto low = static_cast<int8_t>(levels >> (8 * byte) & 0xFFu);
    const auto high = static_cast<int8_t>(levels >> (8 * byte + 16) & 0xFFu);
    const auto pair = static_cast<int32_t>(static_cast<uint32_t>(high) << 16 | (low & 0xFFFFu));
    return reinterpret_cast<Halves>(Words{pair, pair, pair, pair});
  }

  template <int T, int R>
  SGLANG_ER_INLINE static void step(const Streams& streams, const uint32_t* x, Acc (&acc)[T][R]) {
    static_assert(R == 1);
    Halves sums[T][kVectors] = {};
    for (int word = 0; word < kStepWords; ++word) {
      UnsignedHalves raw[kVectors];
      std::memcpy(raw, streams.line(0, word), sizeof(raw));
#pragma GCC unroll 4
      for (int position = 0; position < 4; ++position) {
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
          const Halves levels = broadcast_levels(*levels_of(x, t, word, position % 2), position / 2);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            sums[t][v] += reinterpret_cast<Halves>(raw[v] >> (4 * position) & 15) * levels;
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Words both = reinterpret_cast<Words>(sums[t][v]);
        acc[t][0].rows[v] += (both >> 16) + (reinterpret_cast<Words>(both << 16) >> 16);
      }
    }
  }
};

}  // namespace

void w4a8_linear_portable(const W4A8Call& call) { run_w4_linear<W4A8<Portable>>(call); }

}  // namespace sglang_er::cpu
