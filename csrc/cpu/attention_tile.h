// One tile of query rows (the query heads of one KV head, of consecutive tokens) against one split of a
// context: scores, softmax and the weighted sum of values.
//
// A split is kSplitKeys keys that begin at a multiple of kSplitKeys. For it, every row's arithmetic is fixed:
//   scores  one dimension per lane, vectors of products added in their order, then across lanes
//   softmax p = exp(score - largest of the split), summed lane by lane, then across lanes
//   values  one dimension per lane, p * value added in the order of the keys
// Rows, panels and vectors of keys only group what is independent, so a row gets the same bits whatever other
// rows are in the tile. Keys that a row may not see are never touched on its behalf: a NaN there stays there.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "attention_rows.h"
#include "attention_scores.h"
#include "attention_values.h"
#include "attention_work.h"
#include "kv_rows.h"
#include "paged_attention_op.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

// Calls fn with a null pointer of the type in which a key of the pool, or of the shadow, is stored.
template <class Fn>
SGLANG_ER_INLINE void with_storage(const PagedAttentionCall& call, bool in_shadow, const Fn& fn) {
  if (!in_shadow) return with_type(call.kv_type, fn);
  if (call.shadow.bits == 8) return fn(static_cast<int8_t*>(nullptr));
  return fn(static_cast<Int4*>(nullptr));
}

// Calls mixed() if keys [first, first + count) of the split are of both kinds, else same(in_shadow).
template <class Same, class Mixed>
SGLANG_ER_INLINE void by_kind(const PagedAttentionCall& call, const Workspace& work, int first, int count,
                              const Same& same, const Mixed& mixed) {
  if (call.shadow.bits == 0) return same(false);
  int in_shadow = 0;
  for (int k = first; k < first + count; ++k) in_shadow += work.in_shadow[k];
  if (in_shadow == 0 || in_shadow == count) return same(in_shadow != 0);
  mixed();
}

// Scores of sixteen keys that begin with key `first` of the split.
SGLANG_ER_INLINE void score_vector(const PagedAttentionCall& call, const Tile& tile, const Workspace& work,
                                   int64_t base, int first, const uint8_t* const* rows) {
  by_kind(
      call, work, first, kLanes,
      [&](bool in_shadow) {
        with_storage(call, in_shadow, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          score_keys<T>(tile, work, call.head_dim, base, first, rows);
        });
      },
      [&] {
        with_type(call.kv_type, [&](auto* pool) {
          with_storage(call, true, [&](auto* shadow) {
            using T = std::remove_pointer_t<decltype(pool)>;
            using S = std::remove_pointer_t<decltype(shadow)>;
            if constexpr (std::is_same_v<S, int8_t> || std::is_same_v<S, Int4>)
              score_mixed_keys<T, S>(tile, work, call.head_dim, base, first, rows);
          });
        });
      });
}

SGLANG_ER_INLINE void add_panel(const PagedAttentionCall& call, const Tile& tile, const Workspace& work,
                                int64_t base, int first, int count, const uint8_t* const* rows,
                                Lookahead& ahead) {
  by_kind(
      call, work, first, count,
      [&](bool in_shadow) {
        with_storage(call, in_shadow, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          weigh_values<T>(tile, work, call.value_dim, base, first, count, rows, ahead);
        });
      },
      [&] {
        const int width = round_up(call.value_dim, kLanes);
        for (int key = 0; key < count; ++key) {
          with_storage(call, work.in_shadow[first + key], [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            fill_value<T>(rows[key], call.value_dim, work.panel + int64_t{key} * width);
          });
        }
        add_rows(tile, work, ValuePanel{work.panel, width, ahead}, width, base, first, count);
      });
}

// work.split = softmax and weighted values of the keys from position `base` on.
SGLANG_ER_INLINE void attend_split(const PagedAttentionCall& call, const Tile& tile, int64_t base,
                                   const Next& next, Workspace& work) {
  const int width = round_up(call.value_dim, kLanes);
  const SplitKeys keys = keys_of_split(tile, base);
  const int count = keys.last - keys.first;
  const uint8_t* const* key_rows = work.rows;
  const uint8_t* const* value_rows = work.rows + count;
  if (call.shadow.bits == 0) {
    find_pool_rows(call, tile, base, next, keys, work);
  } else {
    find_shadow_rows(call, tile, base, next, keys, work);
  }

  for (int k = keys.first; k < keys.last; k += kLanes)
    score_vector(call, tile, work, base, k, key_rows + (k - keys.first));

  for (int row = 0; row < tile.rows; ++row) {
    const Span& visible = work.visible[row];
    const auto from = static_cast<int>(visible.begin > base ? visible.begin - base : 0);
    const auto to = static_cast<int>(visible.end < base + kSplitKeys ? visible.end - base : kSplitKeys);
    float* scores = work.scores + int64_t{row} * kSplitKeys;
    work.split.largest[row] = -std::numeric_limits<float>::infinity();
    work.split.sum[row] = 0.0f;
    if (from < to) {
      softmax_row(scores, from, to, work.split.largest + row, work.split.sum + row);
      if (call.shadow.bits != 0) {
        for (int k = from / kLanes * kLanes; k < to; k += kLanes)
          store(scores + k, mul(load(scores + k), load(work.value_scales + k)));
      }
    }
    for (int d = 0; d < width; d += kLanes) store(work.split.values + int64_t{row} * width + d, zero());
  }

  Lookahead ahead{value_rows + kAhead, value_rows + count + kAhead, row_bytes(call, call.value_dim)};
  for (int k = keys.begin; k < keys.end; k += kPanelKeys) {
    const int some = keys.end - k < kPanelKeys ? keys.end - k : kPanelKeys;
    add_panel(call, tile, work, base, k, some, value_rows + (k - keys.first), ahead);
  }
}

}  // namespace
}  // namespace sglang_er::cpu
