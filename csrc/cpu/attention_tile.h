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
#include <type_traits>

#include "attention_scores.h"
#include "attention_values.h"
#include "attention_work.h"
#include "kv_rows.h"
#include "paged_attention_op.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

// Positions [base, base + kSplitKeys) that the tile sees, as keys of the split, and those widened to vectors.
struct SplitKeys {
  int begin, end;   // seen by some row
  int first, last;  // multiples of kLanes
};

SGLANG_ER_INLINE SplitKeys keys_of_split(const Tile& tile, int64_t base) {
  const auto begin = static_cast<int>(tile.keys.begin > base ? tile.keys.begin - base : 0);
  const auto end = static_cast<int>(tile.keys.end < base + kSplitKeys ? tile.keys.end - base : kSplitKeys);
  return {begin, end, begin / kLanes * kLanes, round_up(end, kLanes)};
}

// Finds the rows of the pool for a split's keys; a lane beside them repeats a visible key. The rows that will
// be read after these are the next split's keys, if the unit has one, or the next KV head's.
SGLANG_ER_INLINE void find_rows(const PagedAttentionCall& call, const Tile& tile, int64_t base,
                                int64_t next_base, const SplitKeys& keys, Workspace& work) {
  const int bytes = element_bytes(call.kv_type);
  const int32_t* slots = call.req_to_token + call.rows[tile.request] * call.row_stride;
  const auto* pool_keys = static_cast<const uint8_t*>(call.keys) + tile.kv_head * call.head_dim * bytes;
  const auto* pool_values = static_cast<const uint8_t*>(call.values) + tile.kv_head * call.value_dim * bytes;
  const int64_t key_bytes = call.key_stride * bytes, value_bytes = call.value_stride * bytes;
  const int count = keys.last - keys.first;
  const uint8_t** key_rows = work.rows;
  const uint8_t** value_rows = work.rows + count;
  for (int k = keys.begin; k < keys.end; ++k) {
    const int64_t slot = slots[base + k];
    key_rows[k - keys.first] = pool_keys + slot * key_bytes;
    value_rows[k - keys.first] = pool_values + slot * value_bytes;
  }
  for (int k = 0; k < count; ++k) {
    if (k == keys.begin - keys.first) k = keys.end - keys.first;
    if (k >= count) break;
    key_rows[k] = key_rows[keys.begin - keys.first];
    value_rows[k] = value_rows[keys.begin - keys.first];
  }
  for (int k = keys.first; k < keys.last; ++k) work.key_scales[k] = call.scale;

  const bool wraps = next_base >= tile.keys.end;
  const int64_t first = wraps ? tile.keys.begin : next_base;
  const uint8_t* next = pool_keys + (wraps ? call.head_dim * bytes : 0);
  for (int k = 0; k < kAhead; ++k) {
    const int64_t position = first + k < tile.keys.end ? first + k : tile.keys.end - 1;
    value_rows[count + k] = next + slots[position] * key_bytes;
  }
}

// work.split = softmax and weighted values of the keys from position `base` on.
SGLANG_ER_INLINE void attend_split(const PagedAttentionCall& call, const Tile& tile, int64_t base,
                                   int64_t next_base, Workspace& work) {
  const int width = round_up(call.value_dim, kLanes);
  const SplitKeys keys = keys_of_split(tile, base);
  find_rows(call, tile, base, next_base, keys, work);
  const int count = keys.last - keys.first;
  const uint8_t* const* key_rows = work.rows;
  const uint8_t* const* value_rows = work.rows + count;

  Lookahead ahead{key_rows + kAhead, value_rows + kAhead,
                  int64_t{call.head_dim} * element_bytes(call.kv_type)};
  for (int k = keys.first; k < keys.last; k += kPanelKeys) {
    with_type(call.kv_type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (keys.last - k > kLanes) {
        score_keys<T, 2>(tile, work, call.head_dim, base, k, key_rows + (k - keys.first), ahead);
      } else {
        score_keys<T, 1>(tile, work, call.head_dim, base, k, key_rows + (k - keys.first), ahead);
      }
    });
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

  ahead = {value_rows + kAhead, value_rows + count + kAhead,
           int64_t{call.value_dim} * element_bytes(call.kv_type)};
  for (int k = keys.begin; k < keys.end; k += kPanelKeys) {
    const int some = keys.end - k < kPanelKeys ? keys.end - k : kPanelKeys;
    with_type(call.kv_type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      weigh_values<T>(tile, work, call.value_dim, base, k, some, value_rows + (k - keys.first), ahead);
    });
  }
}

}  // namespace
}  // namespace sglang_er::cpu
