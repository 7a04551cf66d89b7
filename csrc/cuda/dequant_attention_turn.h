// A warp's share of a chunk in dequant_attention: first the tokens of the shadow, copied some steps ahead
// into shared memory, then those of the pool, which are few, straight into registers.
#pragma once

#include <cstdint>

#include "async_copy.h"
#include "dequant_attention_work.h"

namespace sglang_er::cuda {

// One warp's turn at a chunk: every kWarps-th step of it.
template <int Dim, int HeadTiles>
struct Turn {
  using L = Layout<Dim>;
  using SharedMemory = Shared<Dim, HeadTiles>;
  using Stage = typename SharedMemory::Stage;
  static constexpr int kStages = SharedMemory::kStages;

  const DequantAttentionParams& params;
  const Work& work;
  Stage* stages;
  int lane;
  int first;  // position of the first step

  // Of the lane's token in step i.
  __device__ __forceinline__ int slot(int i) const {
    const int position = step_position(first, i) + lane;
    return position < work.shadow_end ? work.slots[position] : -1;
  }

  // Starts the copies of the first steps.
  __device__ __forceinline__ void start() const {
    int slots[kStages - 1];
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) slots[i] = slot(i);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      fetch(stages[i], slots[i]);
      close_copies();
    }
  }

  // Starts copying a step's keys and values; slots are each lane's.
  __device__ __forceinline__ void fetch(Stage& stage, int slot) const {
    constexpr int kRows = 32 / L::kRowUnits;  // that the lanes copy at once
    stage.slots[lane] = slot;
#pragma unroll
    for (int i = 0; i < L::kRowUnits; ++i) {
      const int row = i * kRows + lane / L::kRowUnits, unit = lane % L::kRowUnits;
      const int row_slot = __shfl_sync(kAllLanes, slot, row);
      const int bytes = row_slot >= 0 ? 16 : 0;
      const int64_t from =
          (int64_t{max(row_slot, 0)} * params.kv_heads + work.head) * L::kRowBytes + unit * 16;
      copy_16(stage.keys + L::unit_offset(row, unit), params.shadow_keys + from, bytes);
      copy_16(stage.values + L::unit_offset(row, unit), params.shadow_values + from, bytes);
    }
  }

  struct Scales {
    uint16_t key = 0, value = 0;
    uint8_t valid = 0;
  };
  __device__ __forceinline__ Scales scales(int slot) const {
    Scales loaded;
    if (slot < 0) return loaded;
    const int64_t index = int64_t{slot} * params.kv_heads + work.head;
    loaded.key = params.key_scales[index];
    loaded.value = params.value_scales[index];
    loaded.valid = params.valid[slot];
    return loaded;
  }

  // Tokens of the shadow. Returns in [pool_begin, pool_end) the positions of the steps that have others.
  __device__ __forceinline__ void shadow(const SharedMemory& shared, Running<Dim, HeadTiles>& running,
                                         int& pool_begin, int& pool_end) const {
    Query<Dim, HeadTiles> high, low;
    high.load(shared.high, lane);
    low.load(shared.low, lane);
    float offset[HeadTiles][2];
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        offset[n][e] = kKeyOffset * shared.query_sums[n * kTileHeads + lane % 4 * 2 + e];
    }
    const int steps = steps_before(first, work.shadow_end);
    int next_slot = slot(kStages - 1);
    Scales current = scales(stages[0].slots[lane]);
    for (int i = 0; i < steps; ++i) {
      wait_copies<kStages - 2>();
      __syncwarp();  // everybody's copies are here, and everybody is done with the stage that is filled next
      const Scales next = scales(stages[(i + 1) % kStages].slots[lane]);
      fetch(stages[(i + kStages - 1) % kStages], next_slot);
      close_copies();
      next_slot = slot(i + kStages);

      const Stage& stage = stages[i % kStages];
      const bool counts = current.valid != 0;
      const uint32_t mask = __ballot_sync(kAllLanes, counts);
      if (__any_sync(kAllLanes, !counts && stage.slots[lane] >= 0)) {
        pool_begin = min(pool_begin, step_position(first, i));
        pool_end = step_position(first, i) + kStepTokens;
      }
      if (mask != 0) {
        const float key = counts ? bf16_to_float(current.key) * params.score_factor : 0.0f;
        const float value = counts ? bf16_to_float(current.value) * kValueFactor : 0.0f;
        attend_shadow<Dim, HeadTiles>(stage.keys, stage.values, mask, key, value, high, low, offset, running,
                                      lane);
      }
      current = next;
    }
    if (work.shadow_end == work.end) return;
    pool_begin = min(pool_begin, first_step_past(first, work.shadow_end));
    pool_end = work.end;
  }

  // Tokens of the pool: the newest, and those whose slot the shadow does not have.
  __device__ __forceinline__ void pool(const SharedMemory& shared, Running<Dim, HeadTiles>& running,
                                       int begin, int end) const {
    Query<Dim, HeadTiles> query;
    query.load(shared.plain, lane);
    const PoolHead pool{params.keys + int64_t{work.head} * Dim, params.values + int64_t{work.head} * Dim,
                        params.key_stride, params.value_stride};
    for (int base = begin; base < end; base += kWarps * kStepTokens) {
      const int position = base + lane;
      int slot = position < work.end ? work.slots[position] : -1;
      if (slot >= 0 && position < work.shadow_end && params.valid[slot] != 0) slot = -1;
      const uint32_t mask = __ballot_sync(kAllLanes, slot >= 0);
#pragma unroll 1
      for (int tile = 0; tile < kStepTokens / kTileTokens; ++tile) {
        if ((mask >> (tile * kTileTokens) & 0xFFFFu) == 0) continue;
        attend_pool<Dim, HeadTiles>(pool, tile, slot, mask, params.score_factor, query, running, lane);
      }
    }
  }
};

}  // namespace sglang_er::cuda
