// w4a8_linear on AVX512-VNNI: vpdpbusd adds four u8 x s8 products to each of 16 lanes, x broadcast from
// memory. 64 products an instruction, where an fp32 FMA makes 16.
#include "isa.h"
#include "unrolled.h"
#include "w4a8_linear_avx512.h"

namespace sglang_er::cpu {
namespace {

struct Avx512Vnni : Avx512Levels {
  static constexpr int kMaxTile = 8;
  // Several blocks share what is loaded of x, and words have to be in L1 when arithmetic comes to them.
  static constexpr int blocks_at_once(int rows) { return rows <= 4 ? 4 : 2; }
  static constexpr int64_t prefetch_bytes(int rows) { return rows <= 4 ? 2048 : 4096; }

  // With few sums every word has sums of its own, whole numbers all of them: one chain of additions would
  // take longer than reading the words.
  template <int T, int R>
  SGLANG_ER_INLINE static void step(const Streams& streams, const uint32_t* x, Acc (&acc)[T][R]) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(kNibbles));
    constexpr bool kApart = T * R < 4;
    Acc parts[kStepWords][T][R];
    unrolled<kStepWords>([&](auto word) __attribute__((always_inline)) {
      __m512i raw[R];
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        prefetch(streams.line(r, word) + streams.ahead);
        raw[r] = _mm512_loadu_si512(streams.line(r, word));
      });
      unrolled<2>([&](auto high) __attribute__((always_inline)) {
        __m512i nibbles[R];
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
          nibbles[r] = _mm512_and_si512(high == 0 ? raw[r] : _mm512_srli_epi32(raw[r], 4), mask);
        });
        unrolled<T>([&](auto t) __attribute__((always_inline)) {
          const __m512i levels = _mm512_set1_epi32(static_cast<int>(*levels_of(x, t, word, high)));
          unrolled<R>([&](auto r) __attribute__((always_inline)) {
            if constexpr (kApart) {
              Acc& part = parts[word][t][r];
              part = _mm512_dpbusd_epi32(high == 0 ? Acc{} : part, nibbles[r], levels);
            } else {
              acc[t][r] = _mm512_dpbusd_epi32(acc[t][r], nibbles[r], levels);
              // Left to choose, GCC moves the sums about and keeps three of them on the stack.
              asm volatile("" : "+v"(acc[t][r]));
            }
          });
        });
      });
    });
    if constexpr (kApart) {
      static_assert(kStepWords == 4);
      unrolled<T>([&](auto t) __attribute__((always_inline)) {
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
          const Acc front = _mm512_add_epi32(parts[0][t][r], parts[1][t][r]);
          const Acc back = _mm512_add_epi32(parts[2][t][r], parts[3][t][r]);
          acc[t][r] = _mm512_add_epi32(acc[t][r], _mm512_add_epi32(front, back));
        });
      });
    }
  }
};

// Bound by memory, with few rows: one stream, which AMD's own prefetching follows best (a Zen 5, all of a
// 0.5b: 79 GB/s where four streams read 73). Intel's wants four (a Granite Rapids: 30 GB/s, and 20 with one).
struct OneStream : Avx512Vnni {
  static constexpr int kMaxTile = 2;
  static constexpr int blocks_at_once(int) { return 1; }
  static constexpr int64_t prefetch_bytes(int) { return 6144; }
};

}  // namespace

void w4a8_linear_avx512_vnni(const W4A8Call& call) {
  if (call.m <= OneStream::kMaxTile && made_by_amd()) return run_w4_linear<W4A8<OneStream>>(call);
  run_w4_linear<W4A8<Avx512Vnni>>(call);
}

}  // namespace sglang_er::cpu
