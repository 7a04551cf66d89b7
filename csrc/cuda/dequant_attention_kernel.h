// The kernels of dequant_attention; dequant_attention.cu says who computes what.
#pragma once

#include <climits>
#include <cstdint>

#include "dequant_attention_turn.h"

namespace sglang_er::cuda {

// Merges the warps' results into the partial result of the chunk. Thread for thread all warps hold the same
// dimensions and heads; warp w takes element w of each tile, in which a lane's dimensions follow each other.
template <int Dim, int HeadTiles>
__device__ __forceinline__ void store_partial(const DequantAttentionParams& params, const Work& work,
                                              Shared<Dim, HeadTiles>& shared,
                                              Running<Dim, HeadTiles>& running, int warp, int lane) {
  constexpr int kTiles = Layout<Dim>::kValueTiles;
  wait_copies<0>();  // those past the end write zeros, which must not meet what takes their place
  __syncthreads();   // the stages are free
#pragma unroll
  for (int n = 0; n < HeadTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = running.sum[n][e];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (lane < 4) shared.sums[warp][n * kTileHeads + lane * 2 + e] = {running.largest[n][e], sum};
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) shared.out[warp][m][n][c][lane] = running.out[m][n][c];
    }
  }
  __syncthreads();
  static_assert(kWarps == 4);
  const int64_t part = (int64_t{work.token} * params.kv_heads + work.head) * params.chunks + work.chunk;
#pragma unroll
  for (int n = 0; n < HeadTiles; ++n) {
    const int head = n * kTileHeads + lane % 4 * 2 + warp % 2;
    if (head >= params.group) continue;
    float largest = kLowest, sum = 0.0f, factor[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.sums[w][head].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = exp2_fast(shared.sums[w][head].x - largest);
      sum += shared.sums[w][head].y * factor[w];
    }
    float out[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      out[m] = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) out[m] += shared.out[w][m][n][warp][lane] * factor[w];
    }
    const int64_t index = part * params.group + head;
    float* values = params.partial_values + index * Dim + Layout<Dim>::value_dim(lane, 0, warp >= 2);
#pragma unroll
    for (int m = 0; m < kTiles; m += 4)
      *reinterpret_cast<float4*>(values + m) = {out[m], out[m + 1], out[m + 2], out[m + 3]};
    if (lane < 4 && warp < 2) params.partial_sums[index] = {largest, sum};
  }
}

template <int Dim, int HeadTiles>
__global__ void __launch_bounds__(kWarps * 32, HeadTiles == 1 ? 3 : 2)
    attend(const __grid_constant__ DequantAttentionParams params) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<Dim, HeadTiles>*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  schedule(params, shared);
  const int items = shared.first_chunk[params.tokens] * params.kv_heads;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Work work = work_of(params, shared.first_chunk, item);
    const Turn<Dim, HeadTiles> turn{params, work, shared.stages[warp], lane, work.begin + warp * kStepTokens};
    turn.start();
    prepare_query(params, work, shared, warp, lane);
    __syncthreads();
    Running<Dim, HeadTiles> running;
    running.clear();
    int pool_begin = INT_MAX, pool_end = 0;
    turn.shadow(shared, running, pool_begin, pool_end);
    if (pool_begin < pool_end) turn.pool(shared, running, pool_begin, pool_end);
    store_partial(params, work, shared, running, warp, lane);
    __syncthreads();  // the stages and the query may be written again
  }
}

__device__ __forceinline__ void store_out(float* out, float value) { *out = value; }
__device__ __forceinline__ void store_out(uint16_t* out, float value) { *out = float_to_bf16(value); }

// One block a token and KV head, one warp a query head. Lane c knows chunk c.
template <int Dim, class Out>
__global__ void combine(const __grid_constant__ DequantAttentionParams params) {
  static_assert(kMaxChunks <= 32);
  constexpr int E = Dim / 32;
  const int lane = threadIdx.x % 32, head = threadIdx.x / 32;
  const int token = blockIdx.y, kv_head = blockIdx.x;
  const int request = request_of_token(params.query_begin, params.requests, token);
  const int chunks = chunks_of(visible_tokens(params.query_begin, params.context_lens, request, token));
  const int64_t first = (int64_t{token} * params.kv_heads + kv_head) * params.chunks * params.group + head;
  const float2 own =
      lane < chunks ? params.partial_sums[first + int64_t{lane} * params.group] : float2{kLowest, 0.0f};
  float largest = own.x;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  const float factor = exp2_fast(own.x - largest);
  const float weighted = own.y * factor;
  float sum = 0.0f, values[E] = {};
#pragma unroll 4
  for (int c = 0; c < chunks; ++c) {
    const float take = __shfl_sync(kAllLanes, factor, c);
    sum += __shfl_sync(kAllLanes, weighted, c);
    const float* part = params.partial_values + (first + int64_t{c} * params.group) * Dim + lane * E;
    uint32_t words[E];
    load_words(part, words);
#pragma unroll
    for (int i = 0; i < E; ++i) values[i] += __uint_as_float(words[i]) * take;
  }
  const float inverse = chunks == 0 ? 0.0f : 1.0f / sum;
  Out* out = static_cast<Out*>(params.out) + token * params.out_stride +
             int64_t{kv_head * params.group + head} * Dim + lane * E;
#pragma unroll
  for (int i = 0; i < E; ++i) store_out(out + i, values[i] * inverse);
}

}  // namespace sglang_er::cuda
