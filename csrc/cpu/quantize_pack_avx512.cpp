// quantize_pack on AVX-512: whole blocks of 16 rows and whole groups of 128 without leaving the registers.
//
// A row's group of 128 weights is 8 registers of 16 fp32: for each of four runs of 32 inputs the even ones
// and the odd ones. By the layout (packed_weight.h), run i is nibble position i, evens are half 0, odds half
// 1, and lane l of a run is word l: joining the levels takes shifts and ors only. The 16 rows' registers of
// 16 words are then transposed, which puts row r in lane r, and stored as 16 whole cache lines.
#include <immintrin.h>

#include "quantize_pack.h"

namespace sglang_er::cpu {
namespace {

constexpr int kGroup = 128;
constexpr int kRuns = 4;
constexpr int kRunInputs = kGroup / kRuns;
constexpr int kPrefetchGroups = 2;

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

SGLANG_ER_INLINE __m512i quantize(__m512 weights, __m512 zero, __m512 inverse_scale) {
  const __m512 level = _mm512_mul_ps(_mm512_sub_ps(weights, zero), inverse_scale);
  const __m512 floored = _mm512_max_ps(level, _mm512_setzero_ps());  // the second operand if level is NaN
  return _mm512_cvtps_epi32(_mm512_min_ps(floored, _mm512_set1_ps(kMaxLevel)));
}

// The 16 words of one row's group; its scale and zero go to meta[0] and meta[16].
template <class T>
SGLANG_ER_INLINE __m512i pack_row(const T* weights, uint16_t* meta) {
  EvenOdd runs[kRuns];
  for (int i = 0; i < kRuns; ++i) runs[i] = load_run(weights + i * kRunInputs);
  __m512 low = _mm512_min_ps(runs[0].even, runs[0].odd);
  __m512 high = _mm512_max_ps(runs[0].even, runs[0].odd);
  for (int i = 1; i < kRuns; ++i) {
    low = _mm512_min_ps(low, _mm512_min_ps(runs[i].even, runs[i].odd));
    high = _mm512_max_ps(high, _mm512_max_ps(runs[i].even, runs[i].odd));
  }
  const GroupCode code = group_code(_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high));
  meta[0] = code.scale_bits;
  meta[kRowBlock] = code.zero_bits;

  const __m512 zero = _mm512_set1_ps(code.zero);
  const __m512 inverse_scale = _mm512_set1_ps(code.inverse_scale);
  __m512i words = _mm512_setzero_si512();
  for (int i = 0; i < kRuns; ++i) {
    const __m512i even = quantize(runs[i].even, zero, inverse_scale);
    const __m512i odd = quantize(runs[i].odd, zero, inverse_scale);
    words = _mm512_or_si512(words, _mm512_slli_epi32(even, nibble_shift(0, i)));
    words = _mm512_or_si512(words, _mm512_slli_epi32(odd, nibble_shift(1, i)));
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

template <class T>
void pack_full_block(const QuantizePackCall& call, int64_t block) {
  const PackedShape& shape = call.shape;
  const int64_t full_groups = shape.cols / kGroup;
  const T* weights = static_cast<const T*>(call.weight) + block * kRowBlock * call.weight_stride;
  uint8_t* packed = call.packed + block * shape.block_bytes();
  uint16_t* meta = call.scales_zeros + block * shape.block_meta();
  for (int64_t group = 0; group < full_groups; ++group) {
    __m512i rows[kRowBlock];
    for (int lane = 0; lane < kRowBlock; ++lane) {
      const T* row = weights + lane * call.weight_stride;
      // 16 rows are more streams than the hardware follows well. Into L2: power-of-two strides would evict
      // each other from L1 before use.
      for (size_t line = 0; line < kGroup * sizeof(T); line += 64) {
        const auto* ahead = reinterpret_cast<const char*>(row + kPrefetchGroups * kGroup) + line;
        _mm_prefetch(ahead, _MM_HINT_T1);
      }
      rows[lane] = pack_row(row, meta + lane);
    }
    transpose(rows);
    for (int word = 0; word < kRowBlock; ++word) _mm512_storeu_si512(packed + word * kWordBytes, rows[word]);
    weights += kGroup;
    packed += shape.group_bytes();
    meta += 2 * kRowBlock;
  }
  if (full_groups < shape.groups()) pack_block_group<T>(call, block, full_groups, kRowBlock);
}

}  // namespace

void quantize_pack_avx512(const QuantizePackCall& call) {
  for_each_block(call, [&](auto* type, int64_t block) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (call.shape.group_size == kGroup && rows_in_block(call.shape, block) == kRowBlock) {
      pack_full_block<T>(call, block);
    } else {
      pack_block_any<T>(call, block);
    }
  });
}

}  // namespace sglang_er::cpu
