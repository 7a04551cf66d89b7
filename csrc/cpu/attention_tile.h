// One tile of query rows (the query heads of one KV head, of consecutive tokens) against one split of a
// context: scores, softmax and the weighted sum of values.
//
// A split is kSplitKeys keys that begin at a multiple of kSplitKeys. For it, every row's arithmetic is fixed:
//   scores  one key per lane, products added in the order of the dimensions
//   softmax p = exp(score - largest of the split), summed lane by lane, then across lanes
//   values  one dimension per lane, p * value added in the order of the keys
// Rows, panels and vectors of keys only group what is independent, so a row gets the same bits whatever other
// rows are in the tile. Keys that a row may not see are never touched on its behalf: a NaN there stays there.
#pragma once

#include <cstdint>
#include <limits>

#include "kv_rows.h"
#include "paged_attention_op.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kSplitKeys = 512;
inline constexpr int kTileRows = 64;
inline constexpr int kAhead = 32;  // rows between the one that is read and the one that is asked for

// Rows and vectors that the registers hold at once.
#if defined(__AVX512F__)
inline constexpr int kScoreRows = 8, kValueRows = 4, kValueVectors = 4;
#elif defined(__AVX2__)
inline constexpr int kScoreRows = 2, kValueRows = 2, kValueVectors = 2;
#else
inline constexpr int kScoreRows = 1, kValueRows = 1, kValueVectors = 2;
#endif

SGLANG_ER_INLINE int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Span {
  int64_t begin, end;
};

// Softmax over some keys, not yet divided by its sum, and the values weighted with it.
struct Partial {
  float* largest;  // [rows]
  float* sum;      // [rows]
  float* values;   // [rows][padded value_dim]
};

// Memory of one thread for one tile.
struct Workspace {
  float* q;       // [rows][head_dim]
  float* scores;  // [rows][kSplitKeys]
  float* panel;   // keys [head_dim][kPanelKeys] or values [kPanelKeys][padded value_dim]
  const uint8_t* rows[2 * kSplitKeys + 2 * kLanes + kAhead];  // keys, then values, of the split in order
  float key_scales[kSplitKeys];
  Span visible[kTileRows];  // positions that a row sees
  Partial split;
  Partial total;
};

struct Tile {
  int64_t request;
  int64_t kv_head;
  int64_t first_row;  // row = token of the request * group + query head of the KV head
  int rows;
  Span keys;  // positions that any row sees
};

// p * 0 is NaN for a NaN, which exp() does not keep.
SGLANG_ER_INLINE Floats exp_or_nan(Floats x) { return add(exp(x), mul(max(broadcast(-128.0f), x), zero())); }
SGLANG_ER_INLINE float exp_or_nan(float x) {
  alignas(64) float lanes[kLanes];
  store(lanes, exp_or_nan(broadcast(x)));
  return lanes[0];
}

template <int R, int G>
void score_block(const float* q, int dim, const float* panel, const float* scales, float* scores) {
  Floats acc[R][G];
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g) acc[r][g] = zero();
  }
  for (int d = 0; d < dim; ++d) {
    Floats keys[G];
    for (int g = 0; g < G; ++g) keys[g] = load(panel + d * kPanelKeys + g * kLanes);
    for (int r = 0; r < R; ++r) {
      const Floats element = broadcast(q[r * dim + d]);
      for (int g = 0; g < G; ++g) acc[r][g] = fma(keys[g], element, acc[r][g]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g)
      store(scores + r * kSplitKeys + g * kLanes, mul(acc[r][g], load(scales + g * kLanes)));
  }
}

// Rows [row, end) against a panel of G vectors of keys that begins at position `first` of the split.
template <int R, int G>
void score_rows(const Tile& tile, const Workspace& work, int dim, int64_t base, int first, int row) {
  for (; row + R <= tile.rows; row += R) {
    const int64_t begin = base + first, end = begin + G * kLanes;
    // Rows are in the order of their tokens: the last sees furthest, the first back to the earliest key.
    if (work.visible[row + R - 1].end <= begin || work.visible[row].begin >= end) continue;
    score_block<R, G>(work.q + int64_t{row} * dim, dim, work.panel, work.key_scales + first,
                      work.scores + int64_t{row} * kSplitKeys + first);
  }
  if constexpr (R > 1) score_rows<R / 2, G>(tile, work, dim, base, first, row);
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

// values[R][V vectors] += p[R][begin..end) * panel[begin..end)[V vectors]
template <int R, int V>
void add_values(const float* p, const float* panel, int begin, int end, int width, float* values) {
  Floats acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = load(values + int64_t{r} * width + v * kLanes);
  }
  for (int key = begin; key < end; ++key) {
    Floats value[V];
    for (int v = 0; v < V; ++v) value[v] = load(panel + int64_t{key} * width + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const Floats weight = broadcast(p[r * kSplitKeys + key]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(value[v], weight, acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(values + int64_t{r} * width + v * kLanes, acc[r][v]);
  }
}

template <int R, int V>
SGLANG_ER_INLINE void add_span(const float* p, const float* panel, int begin, int end, int width,
                               float* values) {
  if (begin >= end) return;
  int v = 0;
  for (; v + V * kLanes <= width; v += V * kLanes)
    add_values<R, V>(p, panel + v, begin, end, width, values + v);
  for (; v < width; v += kLanes) add_values<R, 1>(p, panel + v, begin, end, width, values + v);
}

// The keys of a panel of `keys` values that begins at position `first` of the split, for all rows of a tile.
template <int R>
void add_rows(const Tile& tile, const Workspace& work, int width, int64_t base, int first, int keys,
              int row) {
  const auto clamp = [base, first, keys](int64_t position) {
    const int64_t key = position - base - first;
    return static_cast<int>(key < 0 ? 0 : key > keys ? keys : key);
  };
  for (; row + R <= tile.rows; row += R) {
    const float* p = work.scores + int64_t{row} * kSplitKeys + first;
    float* values = work.split.values + int64_t{row} * width;
    const Span* visible = work.visible + row;
    // What all R rows see, together; what lies before and behind it, row by row, in the order of the keys.
    const int begin = clamp(visible[R - 1].begin), end = clamp(visible[0].end);
    const bool together = begin < end;
    for (int r = 0; r < R && R > 1; ++r) {
      const int to = together ? begin : clamp(visible[r].end);
      add_span<1, kValueVectors>(p + r * kSplitKeys, work.panel, clamp(visible[r].begin), to, width,
                                 values + int64_t{r} * width);
    }
    if (together) add_span<R, kValueVectors>(p, work.panel, begin, end, width, values);
    for (int r = 0; r < R && R > 1 && together; ++r) {
      add_span<1, kValueVectors>(p + r * kSplitKeys, work.panel, end, clamp(visible[r].end), width,
                                 values + int64_t{r} * width);
    }
  }
  if constexpr (R > 1) add_rows<R / 2>(tile, work, width, base, first, keys, row);
}

// Rows of the pool that the keys [first, end) of a split need; the vectors' other lanes repeat a visible key.
SGLANG_ER_INLINE void find_rows(const PagedAttentionCall& call, const Tile& tile, int64_t base, int first,
                                int end, Workspace& work) {
  const int bytes = element_bytes(call.kv_type);
  const int32_t* slots = call.req_to_token + call.rows[tile.request] * call.row_stride;
  const auto* keys = static_cast<const uint8_t*>(call.keys) + tile.kv_head * call.head_dim * bytes;
  const auto* values = static_cast<const uint8_t*>(call.values) + tile.kv_head * call.value_dim * bytes;
  const int64_t key_bytes = call.key_stride * bytes, value_bytes = call.value_stride * bytes;
  const uint8_t** key_rows = work.rows;
  const uint8_t** value_rows = work.rows + (end - first);
  for (int k = first; k < end; ++k) {
    int64_t position = base + k;
    if (position < tile.keys.begin) position = tile.keys.begin;
    if (position >= tile.keys.end) position = tile.keys.end - 1;
    const int64_t slot = slots[position];
    key_rows[k - first] = keys + slot * key_bytes;
    value_rows[k - first] = values + slot * value_bytes;
    work.key_scales[k] = call.scale;
  }
  const uint8_t* last = value_rows[end - first - 1];
  for (int k = 0; k < kAhead + kLanes; ++k) value_rows[end - first + k] = last;
}

// work.split = softmax and weighted values of the keys of one split.
SGLANG_ER_INLINE void attend_split(const PagedAttentionCall& call, const Tile& tile, int64_t base,
                                   Workspace& work) {
  const int dim = call.head_dim, width = round_up(call.value_dim, kLanes);
  const int64_t begin = tile.keys.begin > base ? tile.keys.begin - base : 0;
  const int64_t stop = tile.keys.end < base + kSplitKeys ? tile.keys.end - base : kSplitKeys;
  const int first = static_cast<int>(begin / kLanes * kLanes), end = round_up(static_cast<int>(stop), kLanes);
  find_rows(call, tile, base, first, end, work);

  for (int k = first; k < end; k += kPanelKeys) {
    const int vectors = end - k > kLanes ? 2 : 1;
    with_type(call.kv_type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int g = 0; g < vectors; ++g)
        fill_keys<T>(work.rows + (k - first) + g * kLanes, dim, kAhead, work.panel + g * kLanes);
    });
    if (vectors == 2) {
      score_rows<kScoreRows, 2>(tile, work, dim, base, k, 0);
    } else {
      score_rows<kScoreRows, 1>(tile, work, dim, base, k, 0);
    }
  }

  for (int row = 0; row < tile.rows; ++row) {
    const Span& visible = work.visible[row];
    const int64_t from = visible.begin > base ? visible.begin - base : 0;
    const int64_t to = visible.end < base + kSplitKeys ? visible.end - base : kSplitKeys;
    work.split.largest[row] = -std::numeric_limits<float>::infinity();
    work.split.sum[row] = 0.0f;
    if (from < to) {
      softmax_row(work.scores + int64_t{row} * kSplitKeys, static_cast<int>(from), static_cast<int>(to),
                  work.split.largest + row, work.split.sum + row);
    }
    for (int d = 0; d < width; d += kLanes) store(work.split.values + int64_t{row} * width + d, zero());
  }

  const uint8_t* const* value_rows = work.rows + (end - first);
  for (int k = static_cast<int>(begin); k < stop; k += kPanelKeys) {
    const int keys = static_cast<int>(stop - k < kPanelKeys ? stop - k : kPanelKeys);
    with_type(call.kv_type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int i = 0; i < keys; ++i) {
        const uint8_t* const* row = value_rows + (k - first) + i;
        fill_value<T>(row[0], call.value_dim, row[kAhead], work.panel + int64_t{i} * width);
      }
    });
    add_rows<kValueRows>(tile, work, width, base, k, keys, 0);
  }
}

}  // namespace
}  // namespace sglang_er::cpu
