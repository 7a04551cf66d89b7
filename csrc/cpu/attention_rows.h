// Where the keys and values of a split lie: in the pool, or quantized in its shadow.
#pragma once

#include <cstdint>

#include "attention_work.h"
#include "kv_rows.h"
#include "paged_attention_op.h"
#include "sglang_er/bfloat16.h"

namespace sglang_er::cpu {
namespace {

// Keys of the split at `base` that the tile sees.
struct SplitKeys {
  int begin, end;   // seen by some row
  int first, last;  // widened to multiples of kLanes
};

SGLANG_ER_INLINE SplitKeys keys_of_split(const Tile& tile, int64_t base) {
  const auto begin = static_cast<int>(tile.keys.begin > base ? tile.keys.begin - base : 0);
  const auto end = static_cast<int>(tile.keys.end < base + kSplitKeys ? tile.keys.end - base : kSplitKeys);
  return {begin, end, begin / kLanes * kLanes, round_up(end, kLanes)};
}

// Bytes of one KV head's keys or values in a slot, as most keys of the context are stored.
SGLANG_ER_INLINE int64_t row_bytes(const PagedAttentionCall& call, int dim) {
  const int bits = call.shadow.bits == 0 ? 8 * element_bytes(call.kv_type) : call.shadow.bits;
  return int64_t{dim} * bits / 8;
}

// Rows of one KV head: slot s lies at first + s * stride.
struct HeadRows {
  const uint8_t* first;
  int64_t stride;
  SGLANG_ER_INLINE const uint8_t* operator[](int64_t slot) const { return first + slot * stride; }
};

SGLANG_ER_INLINE HeadRows pool_rows(const PagedAttentionCall& call, const void* pool, int64_t stride, int dim,
                                    int64_t head) {
  const int bytes = element_bytes(call.kv_type);
  return {static_cast<const uint8_t*>(pool) + head * dim * bytes, stride * bytes};
}
SGLANG_ER_INLINE HeadRows shadow_rows(const PagedAttentionCall& call, const void* shadow, int dim,
                                      int64_t head) {
  const int64_t bytes = row_bytes(call, dim);
  return {static_cast<const uint8_t*>(shadow) + head * bytes, call.kv_heads * bytes};
}

SGLANG_ER_INLINE const int32_t* slots_of(const PagedAttentionCall& call, const Tile& tile) {
  return call.req_to_token + call.rows[tile.request] * call.row_stride;
}

// Lanes beside the keys that the tile sees repeat the first of these. Behind the values follow the next keys,
// to be asked for ahead of time.
SGLANG_ER_INLINE void complete_rows(const PagedAttentionCall& call, const SplitKeys& keys, const Next& next,
                                    const HeadRows& next_rows, Workspace& work) {
  const int count = keys.last - keys.first, seen = keys.begin - keys.first;
  const uint8_t** value_rows = work.rows + count;
  for (int k = 0; k < count; ++k) {
    if (k == seen) k += keys.end - keys.begin;
    if (k >= count) break;
    work.rows[k] = work.rows[seen];
    value_rows[k] = value_rows[seen];
  }
  const int32_t* slots = slots_of(call, next.tile);
  const Span& seen_next = next.tile.keys;
  int64_t position = next.position < seen_next.begin ? seen_next.begin : next.position;
  for (int k = 0; k < kAhead; ++k, ++position)
    value_rows[count + k] = next_rows[slots[position < seen_next.end ? position : seen_next.end - 1]];
}

SGLANG_ER_INLINE void find_pool_rows(const PagedAttentionCall& call, const Tile& tile, int64_t base,
                                     const Next& next, const SplitKeys& keys, Workspace& work) {
  const int32_t* slots = slots_of(call, tile) + base;
  const HeadRows pool_keys = pool_rows(call, call.keys, call.key_stride, call.head_dim, tile.kv_head);
  const HeadRows pool_values = pool_rows(call, call.values, call.value_stride, call.value_dim, tile.kv_head);
  const uint8_t** key_rows = work.rows - keys.first;
  const uint8_t** value_rows = key_rows + (keys.last - keys.first);
  for (int k = keys.begin; k < keys.end; ++k) {
    key_rows[k] = pool_keys[slots[k]];
    value_rows[k] = pool_values[slots[k]];
  }
  for (int k = keys.first; k < keys.last; ++k) work.key_scales[k] = call.scale;
  complete_rows(call, keys, next,
                pool_rows(call, call.keys, call.key_stride, call.head_dim, next.tile.kv_head), work);
}

SGLANG_ER_INLINE void find_shadow_rows(const PagedAttentionCall& call, const Tile& tile, int64_t base,
                                       const Next& next, const SplitKeys& keys, Workspace& work) {
  const KvShadowView& shadow = call.shadow;
  const int32_t* slots = slots_of(call, tile) + base;
  const HeadRows pool_keys = pool_rows(call, call.keys, call.key_stride, call.head_dim, tile.kv_head);
  const HeadRows pool_values = pool_rows(call, call.values, call.value_stride, call.value_dim, tile.kv_head);
  const HeadRows shadow_keys = shadow_rows(call, shadow.keys, call.head_dim, tile.kv_head);
  const HeadRows shadow_values = shadow_rows(call, shadow.values, call.value_dim, tile.kv_head);
  const int64_t exact_from = call.context_lens[tile.request] - shadow.exact_newest - base;
  const uint8_t** key_rows = work.rows - keys.first;
  const uint8_t** value_rows = key_rows + (keys.last - keys.first);
  for (int k = keys.first; k < keys.last; ++k) {
    const bool seen = k >= keys.begin && k < keys.end;
    const int64_t slot = slots[seen ? k : keys.begin];
    const bool quantized = (seen ? k : keys.begin) < exact_from && shadow.valid[slot] != 0;
    const int64_t scale = slot * call.kv_heads + tile.kv_head;
    work.in_shadow[k] = quantized;
    key_rows[k] = quantized ? shadow_keys[slot] : pool_keys[slot];
    value_rows[k] = quantized ? shadow_values[slot] : pool_values[slot];
    work.key_scales[k] = quantized ? call.scale * bf16_to_float(shadow.key_scales[scale]) : call.scale;
    work.value_scales[k] = quantized ? bf16_to_float(shadow.value_scales[scale]) : 1.0f;
  }
  complete_rows(call, keys, next, shadow_rows(call, shadow.keys, call.head_dim, next.tile.kv_head), work);
}

}  // namespace
}  // namespace sglang_er::cpu
