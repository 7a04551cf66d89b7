// Attention of the last tokens of each request over a paged KV pool: decode, verify and prefill alike.
//
// Bound: decode reads every visible key and value once, whatever the number of query heads and of new tokens
// (up to kTileRows rows share a read), so the aim is sustained read bandwidth. Prefill is bound by the FMA
// units.
//
// Who computes what: a unit is one tile of query rows with all splits of its context, or with one split if
// there are too few tiles for the threads. Partial results of splits are merged in the order of the splits
// either way. With attention_tile.h, a query's result has the same bits in any batch, at any number of query
// tokens and on any number of threads.
//
// Included by one translation unit per instruction set; everything is local to it (anonymous namespace).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "attention_tile.h"
#include "paged_attention_op.h"
#include "parallel.h"
#include "rotation.h"

namespace sglang_er::cpu {
namespace {

// Units of narrow tiles, which are bound by memory, are splits: the KV heads of one split lie in the same
// pages, and going through the whole context for each head would find every page gone from the TLB.
inline constexpr int kNarrowRows = 16;
inline constexpr int64_t kMaxPartialFloats = 8 << 20;

struct Unit {
  Tile tile;
  int64_t first_split;
  int64_t splits;
  float* partials;  // of a unit with one split of several: [rows] largest, [rows] sum, [rows][width] values
};

// Hands out 64-byte aligned pieces of a buffer; without a buffer it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

SGLANG_ER_INLINE Partial take_partial(Arena& arena, int rows, int width) {
  return {arena.take<float>(rows), arena.take<float>(rows), arena.take<float>(int64_t{rows} * width)};
}

SGLANG_ER_INLINE Workspace* take_workspace(Arena& arena, const PagedAttentionCall& call, int rows) {
  const int width = round_up(call.value_dim, kLanes);
  Workspace space{};
  Workspace* work = arena.take<Workspace>(1);
  space.q = arena.take<float>(int64_t{rows} * round_up(call.head_dim, kLanes));
  space.scores = arena.take<float>(int64_t{rows} * kSplitKeys);
  space.panel = arena.take<float>(int64_t{kPanelKeys} * width);
  space.rows = arena.take<const uint8_t*>(2 * kSplitKeys + kAhead);
  space.key_scales = arena.take<float>(kSplitKeys);
  space.visible = arena.take<Span>(rows);
  if (call.shadow.bits != 0) {
    space.shadow_q = arena.take<float>(int64_t{rows} * round_up(call.head_dim, kLanes));
    space.value_scales = arena.take<float>(kSplitKeys);
    space.in_shadow = arena.take<uint8_t>(kSplitKeys);
  }
  space.split = take_partial(arena, rows, width);
  space.total = take_partial(arena, rows, width);
  if (work != nullptr) *work = space;
  return work;
}

SGLANG_ER_INLINE int64_t queries(const PagedAttentionCall& call, int64_t request) {
  return call.query_begin[request + 1] - call.query_begin[request];
}

// Positions that a row of a request sees.
SGLANG_ER_INLINE Span visible_keys(const PagedAttentionCall& call, int64_t request, int64_t row) {
  const int64_t token = row / (call.q_heads / call.kv_heads);
  const int64_t position = call.context_lens[request] - queries(call, request) + token;
  const int64_t begin = call.window < 0 || position < call.window ? 0 : position - call.window;
  return {begin, position + 1};
}

SGLANG_ER_INLINE int64_t splits_of(const Tile& tile) {
  return (tile.keys.end + kSplitKeys - 1) / kSplitKeys - tile.keys.begin / kSplitKeys;
}

// Calls use(unit) for every unit; the KV heads of a tile's split follow each other, as they do in memory.
template <class Fn>
void for_each_unit(const PagedAttentionCall& call, bool by_split, const Fn& use) {
  for (int64_t request = 0; request < call.requests; ++request) {
    const int64_t rows = queries(call, request) * (call.q_heads / call.kv_heads);
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = rows * t / tiles, next = rows * (t + 1) / tiles;
      Tile tile{request,
                0,
                row,
                static_cast<int>(next - row),
                {visible_keys(call, request, row).begin, visible_keys(call, request, next - 1).end}};
      const int64_t first = tile.keys.begin / kSplitKeys;
      const int64_t splits = splits_of(tile);
      for (int64_t split = 0; split < (by_split ? splits : 1); ++split) {
        for (tile.kv_head = 0; tile.kv_head < call.kv_heads; ++tile.kv_head)
          use(Unit{tile, first + split, by_split ? 1 : splits, nullptr}, splits);
      }
    }
  }
}

// total += part, where the sums and values of both are relative to their own largest score.
SGLANG_ER_INLINE void merge_row(int row, int width, const Partial& part, const Partial& total) {
  const float largest = part.largest[row] > total.largest[row] ? part.largest[row] : total.largest[row];
  if (part.sum[row] == 0.0f) return;  // sees no key of this split
  const float keep = total.sum[row] == 0.0f ? 0.0f : exp_or_nan(total.largest[row] - largest);
  const float take = exp_or_nan(part.largest[row] - largest);
  total.largest[row] = largest;
  total.sum[row] = total.sum[row] * keep + part.sum[row] * take;
  float* values = total.values + int64_t{row} * width;
  const float* added = part.values + int64_t{row} * width;
  for (int d = 0; d < width; d += kLanes)
    store(values + d, fma(load(added + d), broadcast(take), mul(load(values + d), broadcast(keep))));
}

SGLANG_ER_INLINE void write_rows(const PagedAttentionCall& call, const Tile& tile, const Partial& total) {
  const int group = call.q_heads / call.kv_heads, width = round_up(call.value_dim, kLanes);
  for (int row = 0; row < tile.rows; ++row) {
    float* values = total.values + int64_t{row} * width;
    for (int d = 0; d < width; d += kLanes)
      store(values + d, div(load(values + d), broadcast(total.sum[row])));
    const int64_t token = call.query_begin[tile.request] + (tile.first_row + row) / group;
    const int64_t head = tile.kv_head * group + (tile.first_row + row) % group;
    const int64_t offset = token * call.out_stride + head * call.value_dim;
    with_type(call.out_type, [&](auto* type) {
      auto* out = static_cast<decltype(type)>(call.out) + offset;
      for (int d = 0; d < call.value_dim; ++d) store_float(out + d, values[d]);
    });
  }
}

SGLANG_ER_INLINE void load_tile(const PagedAttentionCall& call, const Tile& tile, Workspace& work) {
  const int group = call.q_heads / call.kv_heads, dim = call.head_dim, width = round_up(dim, kLanes);
  for (int row = 0; row < tile.rows; ++row) {
    work.visible[row] = visible_keys(call, tile.request, tile.first_row + row);
    const int64_t token = call.query_begin[tile.request] + (tile.first_row + row) / group;
    const int64_t head = tile.kv_head * group + (tile.first_row + row) % group;
    const int64_t offset = token * call.q_stride + head * dim;
    with_type(call.q_type, [&](auto* type) {
      const auto* q = static_cast<decltype(type)>(const_cast<void*>(call.q)) + offset;
      float* values = work.q + int64_t{row} * width;
      for (int d = 0; d < width; ++d) values[d] = d < dim ? to_float(q[d]) : 0.0f;
    });
    float* q = work.q + int64_t{row} * width;
    if (call.shadow.bits != 0) {
      float* shadow_q = work.shadow_q + int64_t{row} * width;
      std::memcpy(shadow_q, q, width * sizeof(float));
      if (call.shadow.bits == 4) {
        rotate(shadow_q, dim);
        split_row(shadow_q, dim);
      }
    }
    if (call.kv_type == DType::kBFloat16) split_row(q, dim);
  }
}

// `following` is what the same thread most likely works on next.
SGLANG_ER_INLINE void run_unit(const PagedAttentionCall& call, const Unit& unit, const Unit& following,
                               Workspace& work) {
  const Tile& tile = unit.tile;
  const int width = round_up(call.value_dim, kLanes);
  const Next next{following.tile, following.first_split * kSplitKeys};
  load_tile(call, tile, work);
  if (unit.partials != nullptr) {
    const Partial own = work.split;
    work.split = {unit.partials, unit.partials + tile.rows, unit.partials + 2 * tile.rows};
    attend_split(call, tile, unit.first_split * kSplitKeys, next, work);
    work.split = own;
    return;
  }
  for (int64_t split = 0; split < unit.splits; ++split) {
    const int64_t base = (unit.first_split + split) * kSplitKeys;
    attend_split(call, tile, base, split + 1 == unit.splits ? next : Next{tile, base + kSplitKeys}, work);
    if (split == 0) {
      std::swap(work.split, work.total);
    } else {
      for (int row = 0; row < tile.rows; ++row) merge_row(row, width, work.split, work.total);
    }
  }
  write_rows(call, tile, work.total);
}

// Merges the splits of one tile and KV head, whose units lie call.kv_heads apart; `unit` is the first.
SGLANG_ER_INLINE void merge_splits(const PagedAttentionCall& call, const Unit* unit) {
  const int64_t splits = splits_of(unit->tile);
  const int rows = unit->tile.rows, width = round_up(call.value_dim, kLanes);
  const auto partial = [&](int64_t split) -> Partial {
    float* memory = unit[split * call.kv_heads].partials;
    return {memory, memory + rows, memory + 2 * rows};
  };
  const Partial total = partial(0);
  for (int64_t split = 1; split < splits; ++split) {
    for (int row = 0; row < rows; ++row) merge_row(row, width, partial(split), total);
  }
  write_rows(call, unit->tile, total);
}

SGLANG_ER_INLINE void run_paged_attention(const PagedAttentionCall& call) {
  const int width = round_up(call.value_dim, kLanes);
  const int64_t pair_bytes = row_bytes(call, call.head_dim + call.value_dim);
  int64_t tiles = 0, units = 0, bytes = 0, partial_floats = 0;
  int rows = 0;
  for_each_unit(call, false, [&](const Unit& unit, int64_t splits) {
    ++tiles;
    units += splits;
    if (unit.tile.rows > rows) rows = unit.tile.rows;
    bytes += (unit.tile.keys.end - unit.tile.keys.begin) * pair_bytes * (1 + unit.tile.rows / kLanes);
    partial_floats += splits * round_up(unit.tile.rows * (2 + width), kLanes);
  });
  if (tiles == 0) return;
  const int threads = threads_for(call.threads, bytes);
  const bool few_tiles = threads > 1 && tiles < 4 * threads;
  const bool by_split =
      units > tiles && (few_tiles || rows <= kNarrowRows) && partial_floats <= kMaxPartialFloats;
  if (!by_split) {
    units = tiles;
    partial_floats = 0;
  }

  Unit* list = nullptr;
  float* partials = nullptr;
  Workspace* first_space = nullptr;
  size_t space_bytes = 0;
  const auto lay_out = [&](char* memory) {
    Arena arena{memory};
    list = arena.take<Unit>(units);
    partials = arena.take<float>(partial_floats);
    for (int worker = 0; worker < threads; ++worker) {
      const size_t before = arena.used;
      Workspace* space = take_workspace(arena, call, rows);
      if (worker == 0) first_space = space, space_bytes = arena.used - before;
    }
    return arena.used;
  };
  lay_out(static_cast<char*>(scratch(lay_out(nullptr))));

  Unit* next = list;
  for_each_unit(call, by_split, [&](Unit unit, int64_t) {
    if (by_split) {
      unit.partials = partials;
      partials += round_up(unit.tile.rows * (2 + width), kLanes);
    }
    *next++ = unit;
  });
  parallel_for(units, threads, [&](int64_t unit, int worker) {
    auto* space = reinterpret_cast<char*>(first_space) + worker * space_bytes;
    const Unit& following = list[unit + 1 < units ? unit + 1 : unit];
    run_unit(call, list[unit], following, *reinterpret_cast<Workspace*>(space));
  });
  if (!by_split) return;
  const auto merge = [&](int64_t unit) {
    if (list[unit].first_split == list[unit].tile.keys.begin / kSplitKeys) merge_splits(call, list + unit);
  };
  parallel_for(units, threads_for(threads, 4 * partial_floats), merge);
}

}  // namespace
}  // namespace sglang_er::cpu
