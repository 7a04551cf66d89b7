// quantize_pack on AVX-512: whole blocks of 16 rows and whole groups of 128 without leaving the registers.
//
// A row's group of 128 weights is 8 registers of 16 fp32: for each of four runs of 32 inputs the even ones
// and the odd ones. By the layout (packed_weight.h), run i is nibble position i, evens are half 0, odds half
// 1, and lane l of a run is word l: joining the levels takes shifts and ors only. The 16 rows' registers of
// 16 words are then transposed, which puts row r in lane r, and stored as 16 whole cache lines.
#include <immintrin.h>

#include "clip_search_avx512.h"
#include "quantize_pack.h"

namespace sglang_er::cpu {
namespace {

constexpr int kRuns = 4;
constexpr int kRunInputs = kGroup / kRuns;

struct EvenOdd {
  __m512 even, odd;
};

SGLANG_ER_INLINE EvenOdd load_run(const BFloat16* weights) {
  const __m512i bits = _mm512_loadu_si512(weights);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))))};
}

SGLANG_ER_INLINE EvenOdd split(__m512 first, __m512 second) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(first, even, second), _mm512_permutex2var_ps(first, odd, second)};
}

SGLANG_ER_INLINE EvenOdd load_run(const float* weights) {
  return split(_mm512_loadu_ps(weights), _mm512_loadu_ps(weights + 16));
}

SGLANG_ER_INLINE EvenOdd load_run(const _Float16* weights) {
  const auto* halves = reinterpret_cast<const __m256i*>(weights);
  return split(_mm512_cvtph_ps(_mm256_loadu_si256(halves)), _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1)));
}

// Levels of 16 weights. bf16 weights are never below their zero where it is their minimum, unrounded.
template <bool kMayBeBelowZero>
SGLANG_ER_INLINE __m512i quantize(__m512 weights, __m512 zero, __m512 inverse_scale) {
  __m512 level = _mm512_mul_ps(_mm512_sub_ps(weights, zero), inverse_scale);
  if constexpr (kMayBeBelowZero) level = _mm512_max_ps(level, _mm512_setzero_ps());
  return _mm512_cvtps_epi32(_mm512_min_ps(level, _mm512_set1_ps(kMaxLevel)));
}

// The 16 words of one row's group, from its runs of even and odd weights.
template <bool kMayBeBelowZero>
SGLANG_ER_INLINE __m512i pack_row(const __m512 (&runs)[2 * kRuns], __m512 zero, __m512 inverse_scale) {
  constexpr int kOr3 = 0xFE;  // a | b | c
  __m512i words = _mm512_setzero_si512();
  for (int i = 0; i < kRuns; ++i) {
    const __m512i even = quantize<kMayBeBelowZero>(runs[2 * i], zero, inverse_scale);
    const __m512i odd = quantize<kMayBeBelowZero>(runs[2 * i + 1], zero, inverse_scale);
    words = _mm512_ternarylogic_epi32(words, _mm512_slli_epi32(even, nibble_shift(0, i)),
                                      _mm512_slli_epi32(odd, nibble_shift(1, i)), kOr3);
  }
  return words;
}

// In: rows[r] lane w. Out: rows[w] lane r. Four passes that swap ever larger squares.
SGLANG_ER_INLINE void transpose(__m512i (&rows)[16]) {
  __m512i other[16];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  // Now 128-bit piece p of rows[4a + b] is column 4p + b of rows 4a..4a+3; the pieces form a 4x4 transpose.
  for (int b = 0; b < 4; ++b) {
    const __m512i low01 = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x88);  // pieces 0, 2
    const __m512i low23 = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xDD);  // pieces 1, 3
    const __m512i high23 = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xDD);
    other[b] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    other[8 + b] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
    other[4 + b] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    other[12 + b] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
  }
  for (int i = 0; i < 16; ++i) rows[i] = other[i];
}

// Whole cache lines, written past the cache: they need not be read first and evict no weights (10 % faster).
SGLANG_ER_INLINE void store_words(uint8_t* packed, const __m512i (&words)[kRowBlock]) {
  const bool aligned = reinterpret_cast<uintptr_t>(packed) % kWordBytes == 0;
  for (int word = 0; word < kRowBlock; ++word) {
    auto* line = reinterpret_cast<__m512i*>(packed + word * kWordBytes);
    aligned ? _mm512_stream_si512(line, words[word]) : _mm512_storeu_si512(line, words[word]);
  }
}

// A whole group of a whole block: runs, minima and maxima of the 16 rows first, then one pass that codes all
// 16, then the words. `ahead`: as many weights of the next block, in the order of memory (8 to 20 % faster on
// a Zen 5 than the same rows' next groups). The runs wait on the stack, where 16 rows a power of two apart do
// not evict each other.
template <bool kClipSearch, class T>
SGLANG_ER_INLINE void pack_full_group(const T* weights, int64_t stride, uint8_t* packed, uint16_t* meta,
                                      const T* ahead) {
  __m512 runs[kRowBlock][2 * kRuns];
  __m512 lows[kRowBlock], highs[kRowBlock];
  for (int lane = 0; lane < kRowBlock; ++lane) {
    const T* row = weights + lane * stride;
    // 16 rows are more streams than the hardware follows well; into L2 for the reason above.
    for (size_t line = 0; line < kGroup * sizeof(T); line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(ahead + lane * kGroup) + line, _MM_HINT_T1);
    for (int i = 0; i < kRuns; ++i) {
      const EvenOdd run = load_run(row + i * kRunInputs);
      runs[lane][2 * i] = run.even;
      runs[lane][2 * i + 1] = run.odd;
      const __m512 low = _mm512_min_ps(run.even, run.odd), high = _mm512_max_ps(run.even, run.odd);
      lows[lane] = i == 0 ? low : _mm512_min_ps(lows[lane], low);
      highs[lane] = i == 0 ? high : _mm512_max_ps(highs[lane], high);
    }
  }
  alignas(64) float zeros[kRowBlock], inverse_scales[kRowBlock];
  const __m512 low = reduce_rows<Min>(lows), high = reduce_rows<Max>(highs);
  const RowCodes whole = code_rows(low, high);
  store_codes(whole, meta, zeros, inverse_scales);
  if constexpr (kClipSearch) {
    alignas(64) int16_t units[kRowBlock][kGroup];
    for (int lane = 0; lane < kRowBlock; ++lane) {
      const __m512 zero = _mm512_set1_ps(zeros[lane]), inverse = _mm512_set1_ps(inverse_scales[lane]);
      for (int i = 0; i < kRuns; ++i) {
        const __m512i even = clip_rows::units(runs[lane][2 * i], zero, inverse);
        const __m512i odd = clip_rows::units(runs[lane][2 * i + 1], zero, inverse);
        _mm512_store_si512(units[lane] + i * kRunInputs, _mm512_packs_epi32(even, odd));
      }
    }
    store_codes(clip_rows::search(units, low, high, whole), meta, zeros, inverse_scales);
  }

  constexpr bool kMayBeBelowZero = kClipSearch || !std::is_same_v<T, BFloat16>;
  __m512i rows[kRowBlock];
  for (int lane = 0; lane < kRowBlock; ++lane) {
    rows[lane] = pack_row<kMayBeBelowZero>(runs[lane], _mm512_set1_ps(zeros[lane]),
                                           _mm512_set1_ps(inverse_scales[lane]));
  }
  transpose(rows);
  store_words(packed, rows);
}

template <bool kClipSearch>
struct Avx512Pack {
  template <class T>
  static bool pack_group(const T* weights, int64_t stride, uint8_t* packed, uint16_t* meta, const T* ahead) {
    pack_full_group<kClipSearch>(weights, stride, packed, meta, ahead);
    return true;
  }
  static void publish() { _mm_sfence(); }
};

}  // namespace

void quantize_pack_avx512(const QuantizePackCall& call) {
  call.clip_search ? run_quantize_pack_fast<Avx512Pack<true>>(call)
                   : run_quantize_pack_fast<Avx512Pack<false>>(call);
}

}  // namespace sglang_er::cpu
