// Scores of a tile's query rows against the keys of a split, and their softmax.
//
// A score is a chain of fused multiply-adds over the dimensions in their order, one key per lane. Few rows
// take the keys straight from the pool (every word is transposed in registers and used at once); more rows
// share a panel of kPanelKeys transposed keys. Both give the same bits.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "attention_work.h"
#include "kv_rows.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

// R rows against G vectors of keys, straight from their rows in the pool. The rows kAhead further on are
// asked for meanwhile, a quarter of them at each quarter of a line.
template <class T, int R, int G>
void score_from_rows(const uint8_t* const* rows, const float* q, int dim, const float* scales,
                     float* scores) {
  constexpr int kPerWord = Packing<T>::kPerWord, kQuarter = kLanes / 4;
  Floats acc[R][G];
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g) acc[r][g] = zero();
  }
  const int64_t bytes = Packing<T>::row_bytes(dim), q_stride = dim;
  for (int64_t offset = 0; offset < bytes; offset += kStepBytes) {
    const uint8_t* const* next = rows + kAhead + offset % 64 / kStepBytes * (G * kQuarter);
    for (int i = 0; i < G * kQuarter; ++i) prefetch(next[i] + offset);
    Words words[G][kStepWords];
    for (int g = 0; g < G; ++g) load_columns(rows + g * kLanes, offset, words[g]);
    unrolled<kStepWords>([&](auto w) {
      unrolled<kPerWord>([&](auto j) {
        Floats keys[G];
        for (int g = 0; g < G; ++g) keys[g] = element<j()>(words[g][w()], static_cast<T*>(nullptr));
        for (int r = 0; r < R; ++r) {
          const Floats factor = broadcast(q[r * q_stride + w() * kPerWord + j()]);
          for (int g = 0; g < G; ++g) acc[r][g] = fma(keys[g], factor, acc[r][g]);
        }
      });
    });
    q += kStepWords * kPerWord;
  }
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g)
      store(scores + r * kSplitKeys + g * kLanes, mul(acc[r][g], load(scales + g * kLanes)));
  }
}

// The same from a panel.
template <int R, int G>
void score_from_panel(const float* panel, const float* q, int dim, const float* scales, float* scores,
                      Lookahead& ahead) {
  Floats acc[R][G];
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g) acc[r][g] = zero();
  }
  constexpr int kChunk = 8;  // head_dim is a multiple of it
  for (int chunk = 0; chunk < dim; chunk += kChunk) {
    ahead.ask(kChunk);
    for (int d = chunk; d < chunk + kChunk; ++d) {
      Floats keys[G];
      for (int g = 0; g < G; ++g) keys[g] = load(panel + d * kPanelKeys + g * kLanes);
      for (int r = 0; r < R; ++r) {
        const Floats element = broadcast(q[r * dim + d]);
        for (int g = 0; g < G; ++g) acc[r][g] = fma(keys[g], element, acc[r][g]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g)
      store(scores + r * kSplitKeys + g * kLanes, mul(acc[r][g], load(scales + g * kLanes)));
  }
}

// Calls score(count of rows, first row) for the rows of a tile, in passes of nearly equal size of up to R;
// rows that see none of G vectors of keys, from key `first` of the split on, are left out.
template <int R, int G, class Fn>
SGLANG_ER_INLINE void each_pass(const Tile& tile, const Workspace& work, int64_t base, int first,
                                const Fn& score) {
  const int64_t begin = base + first, end = begin + G * kLanes;
  for_passes<R>(tile.rows, [&](auto count, int row) {
    // Rows are in the order of their tokens: the last sees furthest, the first back to the earliest key.
    if (work.visible[row + count() - 1].end <= begin || work.visible[row].begin >= end) return;
    score(count, row);
  });
}

// Scores of the rows of q against the G vectors of keys in the panel, which begin with key `first` of the
// split.
template <int G>
SGLANG_ER_INLINE void score_panel(const Tile& tile, const Workspace& work, const float* q, int dim,
                                  int64_t base, int first, Lookahead& ahead) {
  each_pass<kScoreRows, G>(tile, work, base, first, [&](auto count, int row) {
    score_from_panel<count(), G>(work.panel, q + int64_t{row} * dim, dim, work.key_scales + first,
                                 work.scores + int64_t{row} * kSplitKeys + first, ahead);
  });
}

// Scores of all rows against G vectors of keys of one kind that begin with key `first` of the split.
template <class T, int G>
void score_keys(const Tile& tile, const Workspace& work, int dim, int64_t base, int first,
                const uint8_t* const* rows, Lookahead& ahead) {
  const float* q = std::is_same_v<T, Int4> ? work.rotated : work.q;
  if (tile.rows <= kStreamRows && Packing<T>::row_bytes(dim) % kStepBytes == 0) {
    each_pass<kStreamRows, G>(tile, work, base, first, [&](auto count, int row) {
      score_from_rows<T, count(), G>(rows, q + int64_t{row} * dim, dim, work.key_scales + first,
                                     work.scores + int64_t{row} * kSplitKeys + first);
    });
    return;
  }
  for (int g = 0; g < G; ++g) fill_keys<T>(rows + g * kLanes, dim, work.panel + g * kLanes, ahead);
  score_panel<G>(tile, work, q, dim, base, first, ahead);
}

// One vector of keys of which some (T) lie in the pool and some (S) in the shadow. Widening changes no bit of
// a key, so a key of the pool gets the score that it has among its own kind.
template <class T, class S>
void score_mixed_keys(const Tile& tile, const Workspace& work, int dim, int64_t base, int first,
                      const uint8_t* const* rows, Lookahead& ahead) {
  const uint8_t* wide[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    float* out = work.wide + i * dim;
    wide[i] = reinterpret_cast<const uint8_t*>(out);
    if (work.in_shadow[first + i]) {
      widen_key<S>(rows[i], dim, out);
    } else {
      widen_key<T>(rows[i], dim, out);
    }
  }
  fill_keys<float>(wide, dim, work.panel, ahead);
  score_panel<1>(tile, work, work.q, dim, base, first, ahead);
  if constexpr (std::is_same_v<S, Int4>) {
    float* plain = work.wide + kLanes * dim;
    for (int row = 0; row < tile.rows; ++row)
      store(plain + row * kLanes, load(work.scores + int64_t{row} * kSplitKeys + first));
    score_panel<1>(tile, work, work.rotated, dim, base, first, ahead);
    for (int row = 0; row < tile.rows; ++row) {
      for (int i = 0; i < kLanes; ++i) {
        if (!work.in_shadow[first + i])
          work.scores[int64_t{row} * kSplitKeys + first + i] = plain[row * kLanes + i];
      }
    }
  }
}

// p * 0 is NaN for a NaN, which exp() does not keep.
SGLANG_ER_INLINE Floats exp_or_nan(Floats x) { return add(exp(x), mul(max(broadcast(-128.0f), x), zero())); }
SGLANG_ER_INLINE float exp_or_nan(float x) {
  alignas(64) float lanes[kLanes];
  store(lanes, exp_or_nan(broadcast(x)));
  return lanes[0];
}

// Scores [begin, end) of a row become exp(score - largest); those beside them in their vectors become 0.
SGLANG_ER_INLINE void softmax_row(float* scores, int begin, int end, float* largest, float* sum_of_row) {
  const int first = begin / kLanes * kLanes, last = round_up(end, kLanes);
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  for (int k = first; k < begin; ++k) scores[k] = kNone;
  for (int k = end; k < last; ++k) scores[k] = kNone;
  Floats most = load(scores + first);
  for (int k = first + kLanes; k < last; k += kLanes) most = max(most, load(scores + k));
  *largest = reduce_max(most);
  const Floats shift = broadcast(*largest);
  Floats total = zero();
  for (int k = first; k < last; k += kLanes) {
    const Floats p = exp_or_nan(sub(load(scores + k), shift));
    total = add(total, p);
    store(scores + k, p);
  }
  *sum_of_row = sum(total);
}

}  // namespace
}  // namespace sglang_er::cpu
