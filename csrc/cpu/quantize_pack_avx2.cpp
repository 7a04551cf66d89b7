// quantize_pack on AVX2: whole blocks of 16 rows and whole groups of 128, eight rows at a time.
//
// The plan is that of quantize_pack_avx512.cpp with registers of half the width, in which arithmetic, not
// memory, is the limit. So levels are cut and joined as bytes: bytes of 32 inputs in one register take a
// quarter of the operations that 32-bit lanes would. The group is read twice, the second time from L1. Two
// 8x8 transposes put row r in lane r; a word's line of 64 bytes holds both halves of the block, so the first
// half waits on the stack.
#include <immintrin.h>

#include "clip_search_avx2.h"
#include "quantize_pack.h"

namespace sglang_er::cpu {
namespace {

constexpr int kPiece = 16;  // inputs: the evens and odds of 8 words
constexpr int kRun = 32;    // inputs with one nibble position
constexpr int kGroupWords = kGroup / kWeightsPerWord;

struct EvenOdd {
  __m256 even, odd;
};

SGLANG_ER_INLINE EvenOdd widen(__m256i bits) {  // 16 bf16
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))))};
}

SGLANG_ER_INLINE EvenOdd load_piece(const BFloat16* weights) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights)));
}

SGLANG_ER_INLINE EvenOdd split(__m256 first, __m256 second) {
  const auto in_order = [](__m256 pairs) {  // the shuffles below leave 128-bit lanes interleaved
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xD8));
  };
  return {in_order(_mm256_shuffle_ps(first, second, 0x88)), in_order(_mm256_shuffle_ps(first, second, 0xDD))};
}

SGLANG_ER_INLINE EvenOdd load_piece(const float* weights) {
  return split(_mm256_loadu_ps(weights), _mm256_loadu_ps(weights + kHalf));
}

SGLANG_ER_INLINE EvenOdd load_piece(const _Float16* weights) {
  const auto* halves = reinterpret_cast<const __m128i*>(weights);
  return split(_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1)));
}

// Levels of 8 weights of which none is far off the scale: beyond 0..15 is cut where they are joined.
SGLANG_ER_INLINE __m256i levels(__m256 weights, __m256 zero, __m256 inverse_scale) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(weights, zero), inverse_scale));
}

// Levels of a run of 32 inputs as bytes; in each 128-bit half evens and odds of 4 words, then of 4 more.
template <class T>
SGLANG_ER_INLINE __m256i run_levels(const T* weights, __m256 zero, __m256 inverse_scale) {
  __m256i words[2];
  for (int i = 0; i < 2; ++i) {
    const EvenOdd piece = load_piece(weights + i * kPiece);
    words[i] =
        _mm256_packs_epi32(levels(piece.even, zero, inverse_scale), levels(piece.odd, zero, inverse_scale));
  }
  return _mm256_min_epu8(_mm256_packus_epi16(words[0], words[1]),
                         _mm256_set1_epi8(static_cast<char>(kMaxLevel)));
}

struct RowWords {
  __m256i first, second;  // words 0..7 and 8..15
};

// One row's group: nibble position i is run i, so runs 0 and 1 make bytes 0 and 2 of a word, 2 and 3 the
// rest.
template <class T>
SGLANG_ER_INLINE RowWords pack_row(const T* weights, __m256 zero, __m256 inverse_scale) {
  const __m256i pairs = _mm256_broadcastsi128_si256(  // even next to odd
      _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
  __m256i bytes[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i low = run_levels(weights + 2 * i * kRun, zero, inverse_scale);
    const __m256i high = run_levels(weights + (2 * i + 1) * kRun, zero, inverse_scale);
    bytes[i] = _mm256_shuffle_epi8(_mm256_or_si256(low, _mm256_slli_epi16(high, 4)), pairs);
  }
  return {_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[0], bytes[1])};
}

// In: rows[r] lane w. Out: rows[w] lane r.
SGLANG_ER_INLINE void transpose(__m256i (&rows)[kHalf]) {
  __m256i other[kHalf];
  for (int i = 0; i < kHalf; i += 2) {
    other[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kHalf; i += 4) {
    rows[i] = _mm256_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm256_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm256_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm256_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    other[i] = _mm256_permute2x128_si256(rows[i], rows[4 + i], 0x20);
    other[4 + i] = _mm256_permute2x128_si256(rows[i], rows[4 + i], 0x31);
  }
  for (int i = 0; i < kHalf; ++i) rows[i] = other[i];
}

// Smallest and largest weight of each of 8 rows' groups.
struct Extremes {
  __m256 low, high;
};

template <class T>
SGLANG_ER_INLINE Extremes extremes(const T* weights, int64_t stride) {
  __m256 lows[kHalf], highs[kHalf];
  for (int lane = 0; lane < kHalf; ++lane) {
    for (int i = 0; i < kGroup / kPiece; ++i) {
      const EvenOdd piece = load_piece(weights + lane * stride + i * kPiece);
      const __m256 low = _mm256_min_ps(piece.even, piece.odd), high = _mm256_max_ps(piece.even, piece.odd);
      lows[lane] = i == 0 ? low : _mm256_min_ps(lows[lane], low);
      highs[lane] = i == 0 ? high : _mm256_max_ps(highs[lane], high);
    }
  }
  return {reduce_rows<Min>(lows), reduce_rows<Max>(highs)};
}

// bf16 as 16-bit integers, half the work: the largest signed one is the largest weight if any is positive,
// the largest unsigned one is the smallest weight if any is negative. Rows of one sign take the way above.
SGLANG_ER_INLINE Extremes extremes(const BFloat16* weights, int64_t stride) {
  __m256 lows[kHalf], highs[kHalf];
  for (int lane = 0; lane < kHalf; ++lane) {
    const auto* row = reinterpret_cast<const __m256i*>(weights + lane * stride);
    __m256i low = _mm256_loadu_si256(row), high = low;
    for (int i = 1; i < kGroup / kPiece; ++i) {
      const __m256i bits = _mm256_loadu_si256(row + i);
      low = _mm256_max_epu16(low, bits);
      high = _mm256_max_epi16(high, bits);
    }
    const EvenOdd least = widen(low), most = widen(high);
    lows[lane] = _mm256_min_ps(least.even, least.odd);
    highs[lane] = _mm256_max_ps(most.even, most.odd);
  }
  const Extremes found{reduce_rows<Min>(lows), reduce_rows<Max>(highs)};
  const bool both_signs = _mm256_movemask_ps(_mm256_andnot_ps(found.high, found.low)) == 0xFF;
  return both_signs ? found : extremes<BFloat16>(weights, stride);
}

// 16 rows are more streams than the hardware follows well, so the next block is fetched while this one is
// packed, in the order of its memory and a row's worth at a time: as many requests at once would wait for
// each other. On a Zen 3 thread at K = 1024: 9.6 GB/s of weights, 5.2 with the rows' own next groups, 7.4
// with all 64 lines at once.
template <class T>
SGLANG_ER_INLINE void prefetch_group(const T* weights) {
  for (int k = 0; k < kGroup; k += static_cast<int>(64 / sizeof(T))) {
    _mm_prefetch(reinterpret_cast<const char*>(weights + k), _MM_HINT_T1);
  }
}

// The units (clip_search.h) of 8 rows' group, in any order.
template <class T>
SGLANG_ER_INLINE void store_units(const T* weights, int64_t stride, const float* zeros,
                                  const float* inverse_scales, int16_t (&units)[kHalf][kGroup]) {
  for (int lane = 0; lane < kHalf; ++lane) {
    const __m256 zero = _mm256_broadcast_ss(&zeros[lane]),
                 inverse = _mm256_broadcast_ss(&inverse_scales[lane]);
    for (int k = 0; k < kGroup; k += kPiece) {
      const EvenOdd piece = load_piece(weights + lane * stride + k);
      _mm256_store_si256(reinterpret_cast<__m256i*>(units[lane] + k),
                         _mm256_packs_epi32(clip_rows::units(piece.even, zero, inverse),
                                            clip_rows::units(piece.odd, zero, inverse)));
    }
  }
}

// The 16 words of 8 rows' group, words[w] lane r. False, and nothing of use, where a level is beyond int32:
// ranges beyond fp32, weights that bf16 cannot hold and that are (almost) one.
template <bool kClipSearch, class T>
SGLANG_ER_INLINE bool pack_half(const T* weights, int64_t stride, uint16_t* meta, const T* ahead,
                                __m256i (&words)[kGroupWords]) {
  alignas(32) float zeros[kHalf], inverse_scales[kHalf];
  const Extremes range = extremes(weights, stride);
  const RowCodes whole = code_rows(range.low, range.high);
  store_codes(whole, meta, zeros, inverse_scales);
  const __m256 above = _mm256_sub_ps(range.high, _mm256_load_ps(zeros));
  const __m256 most = _mm256_mul_ps(above, _mm256_load_ps(inverse_scales));
  if (_mm256_movemask_ps(_mm256_cmp_ps(most, _mm256_set1_ps(0x1p30f), _CMP_LT_OQ)) != 0xFF) return false;

  if constexpr (kClipSearch) {
    alignas(32) int16_t units[kHalf][kGroup];
    store_units(weights, stride, zeros, inverse_scales, units);
    store_codes(clip_rows::search(units, range.low, range.high, whole), meta, zeros, inverse_scales);
  }
  __m256i first[kHalf], second[kHalf];
  for (int lane = 0; lane < kHalf; ++lane) {
    prefetch_group(ahead + lane * kGroup);
    const RowWords row = pack_row(weights + lane * stride, _mm256_broadcast_ss(&zeros[lane]),
                                  _mm256_broadcast_ss(&inverse_scales[lane]));
    first[lane] = row.first;
    second[lane] = row.second;
  }
  transpose(first);
  transpose(second);
  for (int i = 0; i < kHalf; ++i) {
    words[i] = first[i];
    words[kHalf + i] = second[i];
  }
  return true;
}

// Whole cache lines, written past the cache: they need not be read first and evict no weights.
SGLANG_ER_INLINE void store_words(uint8_t* packed, const __m256i (&words)[2][kGroupWords]) {
  const bool aligned = reinterpret_cast<uintptr_t>(packed) % kWordBytes == 0;
  for (int word = 0; word < kGroupWords; ++word) {
    auto* line = reinterpret_cast<__m256i*>(packed + word * kWordBytes);
    for (int half = 0; half < 2; ++half) {
      aligned ? _mm256_stream_si256(line + half, words[half][word])
              : _mm256_storeu_si256(line + half, words[half][word]);
    }
  }
}

template <bool kClipSearch>
struct Avx2Pack {
  template <class T>
  static bool pack_group(const T* weights, int64_t stride, uint8_t* packed, uint16_t* meta, const T* ahead) {
    __m256i words[2][kGroupWords];
    for (int half = 0; half < 2; ++half) {
      const int row = half * kHalf;
      if (!pack_half<kClipSearch>(weights + row * stride, stride, meta + row, ahead + row * kGroup,
                                  words[half])) {
        return false;
      }
    }
    store_words(packed, words);
    return true;
  }
  static void publish() { _mm_sfence(); }
};

}  // namespace

void quantize_pack_avx2(const QuantizePackCall& call) {
  call.clip_search ? run_quantize_pack_fast<Avx2Pack<true>>(call)
                   : run_quantize_pack_fast<Avx2Pack<false>>(call);
}

}  // namespace sglang_er::cpu
