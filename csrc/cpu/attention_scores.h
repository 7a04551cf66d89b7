// Scores of a tile's query rows against the keys of a split, and their softmax.
//
// A score's sums lie in sixteen lanes, one dimension in each: fused multiply-adds over the vectors of
// dimensions in their order, then sum(). Rows of keys are read as they lie; sixteen keys are added up and
// stored as a vector. How many rows of q and of keys are in registers at a time changes no bit.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "attention_work.h"
#include "kv_rows.h"
#include "sum16.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

// Of G keys, those that fold into a vector (sum16.h).
constexpr int folded(int keys) { return kFolds && keys % 4 == 0 ? 4 : 1; }

// lanes[r][g] = the sums of row r of q with key g and those that fold with it; rows of lanes are kLanes keys
// apart. kDim: the number of dimensions where it is a constant, else 0.
template <class T, int R, int G, int kDim>
SGLANG_ER_INLINE void dot_keys(const uint8_t* const* rows, const float* q, int some_dim, float* lanes) {
  const int dim = kDim == 0 ? some_dim : kDim;
  const int64_t q_stride = round_up(dim, kLanes);
  Floats acc[R][G];
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g) acc[r][g] = zero();
  }
  const auto add_vector = [&](int v, const Floats(&keys)[G]) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      const Floats part = load(q + r * q_stride + v * kLanes);
      for (int g = 0; g < G; ++g) acc[r][g] = fma(keys[g], part, acc[r][g]);
    }
  };
  Floats keys[G];
  int v = 0;
  if constexpr (split<T>) {
    Floats odd[G];
#pragma GCC unroll 4
    for (; (v + 2) * kLanes <= dim; v += 2) {
      for (int g = 0; g < G; ++g)
        load_split(reinterpret_cast<const T*>(rows[g] + Packing<T>::row_bytes(v * kLanes)), keys[g], odd[g]);
      add_vector(v, keys);
      add_vector(v + 1, odd);
    }
  }
  if constexpr (!std::is_same_v<T, Int4>) {  // whose dimensions are multiples of 32
    for (; (v + 1) * kLanes <= dim; ++v) {
      for (int g = 0; g < G; ++g) keys[g] = load_value<T>(rows[g], v);
      add_vector(v, keys);
    }
    if (v * kLanes < dim) {
      for (int g = 0; g < G; ++g) keys[g] = load_last_value<T>(rows[g], dim);
      add_vector(v, keys);
    }
  }
  constexpr int F = folded(G);
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; g += F) store(lanes + (r * kLanes + g) * kLanes, fold<F>(acc[r] + g));
  }
}

// Calls dot(R, first row, lanes) for the rows of a tile, in passes of nearly equal size of up to kScoreRows,
// and stores what sixteen keys from key `first` of the split on get of them, folded F at a time. Rows that
// see none of these are left out.
template <int F, class Dot>
SGLANG_ER_INLINE void score_passes(const Tile& tile, const Workspace& work, int64_t base, int first,
                                   const Dot& dot) {
  const int64_t begin = base + first, end = begin + kLanes;
  for_passes<kScoreRows>(tile.rows, [&](auto count, int row) {
    // Rows are in the order of their tokens: the last sees furthest, the first back to the earliest key.
    if (work.visible[row + count() - 1].end <= begin || work.visible[row].begin >= end) return;
    alignas(64) float lanes[count() * kLanes * kLanes];
    dot(count, row, lanes);
    const Floats scales = load(work.key_scales + first);
    for (int r = 0; r < count(); ++r)
      store(work.scores + int64_t{row + r} * kSplitKeys + first,
            mul(sum16<F>(lanes + r * kLanes * kLanes), scales));
  });
}

// The query rows that keys of a kind meet, from `row` on.
template <class T>
SGLANG_ER_INLINE const float* queries_for(const Workspace& work, int dim, int row) {
  constexpr bool kInShadow = std::is_same_v<T, Int4> || std::is_same_v<T, int8_t>;
  return (kInShadow ? work.shadow_q : work.q) + int64_t{row} * round_up(dim, kLanes);
}

// Calls use(constant) with the dimensions of most models, which unroll the loop over them (a fifth faster
// with two rows), or with 0.
template <class Fn>
SGLANG_ER_INLINE void with_dim(int dim, const Fn& use) {
  if (dim == 128) return use(std::integral_constant<int, 128>{});
  if (dim == 64) return use(std::integral_constant<int, 64>{});
  use(std::integral_constant<int, 0>{});
}

// Scores of all rows against sixteen keys of one kind that begin with key `first` of the split. The rows
// kAhead further on are asked for meanwhile.
template <class T>
void score_keys(const Tile& tile, const Workspace& work, int dim, int64_t base, int first,
                const uint8_t* const* rows) {
  constexpr int F = folded(keys_at_once(kScoreRows));
  score_passes<F>(tile, work, base, first, [&](auto count, int row, float* lanes) {
    constexpr int kKeys = keys_at_once(count());
    static_assert(folded(kKeys) == F && kLanes % kKeys == 0);
    const float* q = queries_for<T>(work, dim, row);
    with_dim(dim, [&](auto constant) {
      for (int key = 0; key < kLanes; key += kKeys) {
        for (int g = 0; row == 0 && g < kKeys; ++g) {
          for (int64_t offset = 0; offset < Packing<T>::row_bytes(dim); offset += 64)
            prefetch(rows[kAhead + key + g] + offset);
        }
        dot_keys<T, count(), kKeys, constant()>(rows + key, q, dim, lanes + key * kLanes);
      }
    });
  });
}

// The same where some keys (T) lie in the pool and some (S) in the shadow.
template <class T, class S>
void score_mixed_keys(const Tile& tile, const Workspace& work, int dim, int64_t base, int first,
                      const uint8_t* const* rows) {
  score_passes<1>(tile, work, base, first, [&](auto count, int row, float* lanes) {
    const auto score = [&](auto* type, int key) {
      using Kind = std::remove_pointer_t<decltype(type)>;
      dot_keys<Kind, count(), 1, 0>(rows + key, queries_for<Kind>(work, dim, row), dim, lanes + key * kLanes);
    };
    for (int key = 0; key < kLanes; ++key) {
      if (work.in_shadow[first + key]) {
        score(static_cast<S*>(nullptr), key);
      } else {
        score(static_cast<T*>(nullptr), key);
      }
    }
  });
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
