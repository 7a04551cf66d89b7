// Values of a split, weighted with the softmax of a tile's query rows: one dimension per lane, added in the
// order of the keys. Few rows read the pool directly, more rows share a panel of fp32 values; the bits are
// the same.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention_work.h"
#include "kv_rows.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

// Where value vectors come from: rows of the pool, from key `first` of the split on. The incomplete vector at
// the end of a row has a source of its own: it passes through memory, which would cost every other vector its
// registers.
template <class T>
struct LastValues {
  const uint8_t* const* rows;
  int dim;
  SGLANG_ER_INLINE void load_vectors(int key, int, Floats (&value)[1]) const {
    value[0] = load_last_value<T>(rows[key], dim);
  }
};
template <class T>
struct ValueRows {
  const uint8_t* const* rows;
  int dim;
  SGLANG_ER_INLINE int vectors() const { return dim / kLanes; }
  SGLANG_ER_INLINE LastValues<T> last() const { return {rows, dim}; }
  template <int V>
  SGLANG_ER_INLINE void load_vectors(int key, int first, Floats (&value)[V]) const {
    const uint8_t* next = rows[key + kAhead];
    for (int v = 0; v < V; ++v) {
      const int64_t offset = Packing<T>::row_bytes((first + v) * kLanes);
      if (offset % 64 == 0) prefetch(next + offset);
      if constexpr (std::is_same_v<T, Int4> && V > 1) {  // first is even
        if (v % 2 == 0)
          load_levels(reinterpret_cast<const Int4*>(rows[key] + offset), value[v], value[v + 1]);
      } else {
        value[v] = load_value<T>(rows[key], first + v);
      }
    }
  }
};
struct ValuePanel {
  const float* panel;
  int width;
  Lookahead& ahead;
  SGLANG_ER_INLINE int vectors() const { return width / kLanes; }
  SGLANG_ER_INLINE const ValuePanel& last() const { return *this; }
  template <int V>
  SGLANG_ER_INLINE void load_vectors(int key, int first, Floats (&value)[V]) const {
    ahead.ask(2);
    const float* row = panel + int64_t{key} * width + first * kLanes;
    for (int v = 0; v < V; ++v) value[v] = load(row + v * kLanes);
  }
};

// out[R][V vectors from `first` on] += p[R][begin..end) * values
template <int R, int V, class Source>
void add_values(const float* p, const Source& source, int begin, int end, int first, int width, float* out) {
  Floats acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = load(out + int64_t{r} * width + (first + v) * kLanes);
  }
  for (int key = begin; key < end; ++key) {
    Floats value[V];
    source.load_vectors(key, first, value);
    for (int r = 0; r < R; ++r) {
      const Floats weight = broadcast(p[r * kSplitKeys + key]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(value[v], weight, acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(out + int64_t{r} * width + (first + v) * kLanes, acc[r][v]);
  }
}

template <int R, int V, class Source>
SGLANG_ER_INLINE void add_span(const float* p, const Source& source, int begin, int end, int width,
                               float* out) {
  if (begin >= end) return;
  const int vectors = source.vectors();
  int v = 0;
  for (; v + V <= vectors; v += V) add_values<R, V>(p, source, begin, end, v, width, out);
  for (; v < vectors; ++v) add_values<R, 1>(p, source, begin, end, v, width, out);
  if (v * kLanes < width) add_values<R, 1>(p, source.last(), begin, end, v, width, out);
}

// Keys [first, first + keys) of the split for all rows of the tile.
template <class Source>
void add_rows(const Tile& tile, const Workspace& work, const Source& source, int width, int64_t base,
              int first, int keys) {
  const auto clamp = [base, first, keys](int64_t position) {
    const int64_t key = position - base - first;
    return static_cast<int>(key < 0 ? 0 : key > keys ? keys : key);
  };
  for_passes<kValueRows>(tile.rows, [&](auto count, int row) {
    constexpr int kRows = count();
    const float* p = work.scores + int64_t{row} * kSplitKeys + first;
    float* out = work.split.values + int64_t{row} * width;
    const Span* visible = work.visible + row;
    // What all these rows see, together; what lies before and behind it, row by row, in the order of the
    // keys.
    const int begin = clamp(visible[kRows - 1].begin), end = clamp(visible[0].end);
    const bool together = begin < end;
    const auto alone = [&](int r, int from, int to) {
      add_span<1, value_vectors(1)>(p + r * kSplitKeys, source, from, to, width, out + int64_t{r} * width);
    };
    for (int r = 0; r < kRows; ++r)
      alone(r, clamp(visible[r].begin), together ? begin : clamp(visible[r].end));
    if (!together) return;
    add_span<kRows, value_vectors(kRows)>(p, source, begin, end, width, out);
    for (int r = 0; r < kRows; ++r) alone(r, end, clamp(visible[r].end));
  });
}

template <class T>
SGLANG_ER_INLINE void fill_value(const uint8_t* row, int dim, float* out) {
  int v = 0;
  for (; (v + 1) * kLanes <= dim; ++v) store(out + v * kLanes, load_value<T>(row, v));
  if (v * kLanes < dim) store(out + v * kLanes, load_last_value<T>(row, dim));
}

// Keys [first, first + keys) of the split, whose values lie in `rows`, for all rows of the tile.
template <class T>
void weigh_values(const Tile& tile, const Workspace& work, int dim, int64_t base, int first, int keys,
                  const uint8_t* const* rows, Lookahead& ahead) {
  const int width = round_up(dim, kLanes);
  if (tile.rows <= kValueRows) {
    add_rows(tile, work, ValueRows<T>{rows, dim}, width, base, first, keys);
    return;
  }
  for (int key = 0; key < keys; ++key) {
    fill_value<T>(rows[key], dim, work.panel + int64_t{key} * width);
    ahead.ask(1);
  }
  add_rows(tile, work, ValuePanel{work.panel, width, ahead}, width, base, first, keys);
}

}  // namespace
}  // namespace sglang_er::cpu
