// What a block of dequant_attention works on: its shared memory, its share of the chunks, the query as
// operands.
#pragma once

#include <cstdint>

#include "dequant_attention_warp.h"
#include "rotation_warp.h"
#include "sglang_er/dequant_attention.h"
#include "sglang_er/split_schedule.h"

namespace sglang_er::cuda {

struct DequantAttentionParams {
  const uint16_t* q;  // [tokens, kv_heads * group, Dim] bf16
  int64_t q_stride;
  const uint16_t* keys;  // the pool, [slots, kv_heads, Dim] bf16
  const uint16_t* values;
  int64_t key_stride;
  int64_t value_stride;
  const uint8_t* shadow_keys;  // [slots, kv_heads, Dim / 2]
  const uint8_t* shadow_values;
  const uint16_t* key_scales;  // [slots, kv_heads] bf16
  const uint16_t* value_scales;
  const uint8_t* valid;  // [slots]
  const int32_t* req_to_token;
  int64_t row_stride;
  const int64_t* rows;
  const int64_t* query_begin;
  const int64_t* context_lens;
  int tokens;
  int requests;
  int kv_heads;
  int group;  // query heads of a KV head
  int exact_newest;
  int chunks;          // that a token has at most, kMaxChunks or fewer
  float score_factor;  // scale * log2(e): scores are powers of two
  float norm;          // of the rotation
  float*
      partial_values;    // [tokens, kv_heads, chunks, group, Dim], relative to the largest score of the chunk
  float2* partial_sums;  // [tokens, kv_heads, chunks, group]: largest score, sum of weights
  void* out;             // [tokens, kv_heads * group, Dim]
  int64_t out_stride;
};

template <int Dim, int HeadTiles>
struct Shared {
  using L = Layout<Dim>;
  static constexpr int kStages = Dim == 128 ? 3 : 4;
  static constexpr int kHeads = HeadTiles * kTileHeads;

  struct Stage {
    uint8_t keys[L::kStepBytes];
    uint8_t values[L::kStepBytes];
    int slots[kStepTokens];
  };
  union {
    Stage stages[kWarps][kStages];
    float out[kWarps][L::kValueTiles][HeadTiles][4][32];
  };
  // B operands of q: rotated, in two parts, and as it is.
  uint32_t high[HeadTiles * L::kQueryWords];
  uint32_t low[HeadTiles * L::kQueryWords];
  uint32_t plain[HeadTiles * L::kQueryWords];
  float query_sums[kHeads];
  float2 sums[kWarps][kHeads];
  int warp_chunks[kWarps];
  int first_chunk[kMaxScheduledTokens + 1];
};

// What a block works on: a chunk of a token's context and one KV head.
struct Work {
  int token;
  int chunk;
  int head;
  int begin;  // positions of the chunk
  int end;
  int shadow_end;  // those from here on are read from the pool
  const int32_t* slots;
};

// shared.first_chunk, by the whole block.
template <class SharedMemory>
__device__ __forceinline__ void schedule(const DequantAttentionParams& params, SharedMemory& shared) {
  const int per_thread = (params.tokens + kWarps * 32 - 1) / (kWarps * 32);
  const int first = static_cast<int>(threadIdx.x) * per_thread;
  const int last = min(first + per_thread, params.tokens);
  const auto chunks = [&](int token) {
    const int request = request_of_token(params.query_begin, params.requests, token);
    return chunks_of(visible_tokens(params.query_begin, params.context_lens, request, token));
  };
  int own = 0;
  for (int token = first; token < last; ++token) own += chunks(token);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int total = own;  // of this lane and those before it
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, total, distance);
    if (lane >= distance) total += other;
  }
  if (lane == 31) shared.warp_chunks[warp] = total;
  __syncthreads();
  int next = total - own;
  for (int w = 0; w < warp; ++w) next += shared.warp_chunks[w];
  for (int token = first; token < last; ++token) {
    shared.first_chunk[token] = next;
    next += chunks(token);
  }
  if (first < params.tokens && last == params.tokens) shared.first_chunk[params.tokens] = next;
  __syncthreads();
}

__device__ __forceinline__ Work work_of(const DequantAttentionParams& params, const int* first_chunk,
                                        int item) {
  const ScheduledChunk scheduled = scheduled_chunk(first_chunk, params.tokens, item / params.kv_heads);
  const int request = request_of_token(params.query_begin, params.requests, scheduled.token);
  const int64_t visible = visible_tokens(params.query_begin, params.context_lens, request, scheduled.token);
  const int64_t size = chunk_tokens(visible), begin = scheduled.chunk * size;
  const int64_t end = min(begin + size, visible);
  const int64_t shadow_end = max(begin, min(end, params.context_lens[request] - params.exact_newest));
  return {scheduled.token,
          scheduled.chunk,
          item % params.kv_heads,
          static_cast<int>(begin),
          static_cast<int>(end),
          static_cast<int>(shadow_end),
          params.req_to_token + params.rows[request] * params.row_stride};
}

// The query heads of one KV head as B operands, by the whole block; heads that do not exist are zero.
template <int Dim, int HeadTiles>
__device__ __forceinline__ void prepare_query(const DequantAttentionParams& params, const Work& work,
                                              Shared<Dim, HeadTiles>& shared, int warp, int lane) {
  using L = Layout<Dim>;
  constexpr int E = Dim / 32;
  auto* high = reinterpret_cast<uint16_t*>(shared.high);
  auto* low = reinterpret_cast<uint16_t*>(shared.low);
  auto* plain = reinterpret_cast<uint16_t*>(shared.plain);
  for (int head = warp; head < Shared<Dim, HeadTiles>::kHeads; head += kWarps) {
    uint32_t words[E / 2];
#pragma unroll
    for (int i = 0; i < E / 2; ++i) words[i] = 0;
    if (head < params.group) {
      const uint16_t* q =
          params.q + work.token * params.q_stride + int64_t{work.head * params.group + head} * Dim;
      load_words(q + lane * E, words);
    }
    float x[E];
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      const int position =
          head / kTileHeads * L::kQueryWords * 2 + L::pool_query_position(head % kTileHeads, lane * E + i);
      plain[position] = bits;
      x[i] = bf16_to_float(bits);
    }
    rotate_in_warp<E>(x, Dim, params.norm, lane);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const HighLow parts = high_low(x[i]);
      const int position =
          head / kTileHeads * L::kQueryWords * 2 + L::query_position(head % kTileHeads, lane * E + i);
      high[position] = parts.high;
      low[position] = parts.low;
      sum += bf16_to_float(parts.high) + bf16_to_float(parts.low);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane == 0) shared.query_sums[head] = sum;
  }
}

}  // namespace sglang_er::cuda
