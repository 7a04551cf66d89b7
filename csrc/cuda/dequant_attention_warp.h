// What one warp of dequant_attention computes: scores, softmax and weighted values of some tokens, from the
// int4 shadow or from the bf16 pool. dequant_attention.h says which lane holds what.
#pragma once

#include <cstdint>

#include "dequant_attention_ptx.h"
#include "sglang_er/dequant_attention.h"

namespace sglang_er::cuda {

using namespace dequant_attention;  // NOLINT: this header is its device side

// B operands of a query: [tile of heads][step].
template <int Dim, int HeadTiles>
struct Query {
  FragmentB step[HeadTiles][Layout<Dim>::kKeySteps];

  __device__ __forceinline__ void load(const uint32_t* shared, int lane) {
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) {
#pragma unroll
      for (int s = 0; s < Layout<Dim>::kKeySteps; ++s)
        load_words(shared + n * Layout<Dim>::kQueryWords + (s * 32 + lane) * 2, step[n][s].reg);
    }
  }
};

// Online softmax of the heads that a lane's columns are, and its share of the outputs. The largest score is
// the same in all lanes of a column; the sum is each lane's own.
template <int Dim, int HeadTiles>
struct Running {
  float largest[HeadTiles][2];
  float sum[HeadTiles][2];
  float out[Layout<Dim>::kValueTiles][HeadTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) {
      largest[n][0] = largest[n][1] = kLowest;
      sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll
      for (int m = 0; m < Layout<Dim>::kValueTiles; ++m)
        out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0.0f;
    }
  }

  // Turns scores (base 2) into weights relative to the largest so far and takes along what was summed before.
  template <int Tiles>
  __device__ __forceinline__ void weigh(float (&scores)[Tiles][HeadTiles][4]) {
    float keep[HeadTiles][2];
    bool changed = false;
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float top = fmaxf(scores[0][n][e], scores[0][n][e + 2]);
#pragma unroll
        for (int j = 1; j < Tiles; ++j) top = fmaxf(top, fmaxf(scores[j][n][e], scores[j][n][e + 2]));
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
        top = fmaxf(top, largest[n][e]);
        keep[n][e] = exp2_fast(largest[n][e] - top);
        changed = changed || top != largest[n][e];
        largest[n][e] = top;
        float added = 0.0f;
#pragma unroll
        for (int j = 0; j < Tiles; ++j) {
          scores[j][n][e] = exp2_fast(scores[j][n][e] - top);
          scores[j][n][e + 2] = exp2_fast(scores[j][n][e + 2] - top);
          added += scores[j][n][e] + scores[j][n][e + 2];
        }
        sum[n][e] = sum[n][e] * keep[n][e] + added;
      }
    }
    if (!__any_sync(kAllLanes, changed)) return;
#pragma unroll
    for (int m = 0; m < Layout<Dim>::kValueTiles; ++m) {
#pragma unroll
      for (int n = 0; n < HeadTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) out[m][n][c] *= keep[n][c % 2];
      }
    }
  }

  __device__ __forceinline__ void add_values(int tile, const FragmentA& a,
                                             const FragmentB (&weights)[HeadTiles]) {
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) mma::multiply_add<false>(out[tile][n], a, weights[n]);
  }
};

// B operands of weights times a factor of tokens g and g + 8.
template <int HeadTiles>
__device__ __forceinline__ void weights_operand(const float (&weights)[HeadTiles][4], float first,
                                                float second, FragmentB (&operand)[HeadTiles]) {
#pragma unroll
  for (int n = 0; n < HeadTiles; ++n) {
    operand[n].reg[0] = transpose(bf16_pair(weights[n][0] * first, weights[n][1] * first));
    operand[n].reg[1] = transpose(bf16_pair(weights[n][2] * second, weights[n][3] * second));
  }
}

// Token `row` of a step is masked out unless its bit is set.
template <int HeadTiles>
__device__ __forceinline__ void scale_scores(float (&scores)[HeadTiles][4], uint32_t mask, int row,
                                             float first, float second) {
  const bool see_first = (mask >> row & 1u) != 0, see_second = (mask >> (row + 8) & 1u) != 0;
  const float nothing = __int_as_float(0xFF800000);
#pragma unroll
  for (int n = 0; n < HeadTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      scores[n][e] = see_first ? scores[n][e] * first : nothing;
      scores[n][e + 2] = see_second ? scores[n][e + 2] * second : nothing;
    }
  }
}

// 32 tokens of the shadow, whose keys and values are in shared memory; those with a bit in `mask` count.
// key_factor and value_factor of token l are in lane l.
template <int Dim, int HeadTiles>
__device__ __forceinline__ void attend_shadow(const uint8_t* keys, const uint8_t* values, uint32_t mask,
                                              float key_factor, float value_factor,
                                              const Query<Dim, HeadTiles>& high,
                                              const Query<Dim, HeadTiles>& low,
                                              const float (&offset)[HeadTiles][2],
                                              Running<Dim, HeadTiles>& running, int lane) {
  using L = Layout<Dim>;
  constexpr int kTiles = kStepTokens / kTileTokens;
  const int g = lane / 4;
  float scores[kTiles][HeadTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int row = j * kTileTokens + g;
    uint32_t first[L::kKeyWords], second[L::kKeyWords];
    load_words(keys + L::key_offset(row, lane), first);
    load_words(keys + L::key_offset(row + 8, lane), second);
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[j][n][c] = offset[n][c % 2];
    }
#pragma unroll
    for (int s = 0; s < L::kKeySteps; ++s) {
      const FragmentA a = key_operand(first[s / 2], second[s / 2], s % 2);
#pragma unroll
      for (int n = 0; n < HeadTiles; ++n) {
        mma::multiply_add<false>(scores[j][n], a, high.step[n][s]);
        mma::multiply_add<false>(scores[j][n], a, low.step[n][s]);
      }
    }
    scale_scores(scores[j], mask, row, __shfl_sync(kAllLanes, key_factor, row),
                 __shfl_sync(kAllLanes, key_factor, row + 8));
  }
  running.weigh(scores);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int row = j * kTileTokens + g;
    FragmentB weights[HeadTiles];
    weights_operand(scores[j], __shfl_sync(kAllLanes, value_factor, row),
                    __shfl_sync(kAllLanes, value_factor, row + 8), weights);
    uint32_t words[4][L::kValueWords];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      load_words(values + L::value_offset(j * kTileTokens + value_row(lane, r), lane), words[r]);
#pragma unroll
    for (int m = 0; m < L::kValueTiles; ++m) {
      const int word = m / 4, half = m / 2 % 2;
      running.add_values(m,
                         value_operand(pair_halves(words[0][word], words[1][word], half),
                                       pair_halves(words[2][word], words[3][word], half), m % 2),
                         weights);
    }
  }
}

// Keys and values of one KV head in the pool.
struct PoolHead {
  const uint16_t* keys;
  const uint16_t* values;
  int64_t key_stride;
  int64_t value_stride;
};

// Sixteen tokens of the pool: token l of the step has slot `slot` of lane l, -1 if it does not count.
template <int Dim, int HeadTiles>
__device__ __forceinline__ void attend_pool(const PoolHead& pool, int tile, int slot, uint32_t mask,
                                            float score_factor, const Query<Dim, HeadTiles>& query,
                                            Running<Dim, HeadTiles>& running, int lane) {
  using L = Layout<Dim>;
  const int row = tile * kTileTokens + lane / 4;
  const int first_slot = __shfl_sync(kAllLanes, slot, row),
            second_slot = __shfl_sync(kAllLanes, slot, row + 8);
  uint32_t first[L::kKeyWords][4], second[L::kKeyWords][4];
#pragma unroll
  for (int i = 0; i < L::kKeyWords; ++i) {
    load_pool(pool.keys, pool.key_stride, first_slot, L::pool_key_dim(lane, i), first[i]);
    load_pool(pool.keys, pool.key_stride, second_slot, L::pool_key_dim(lane, i), second[i]);
  }
  uint32_t words[4][2][L::kValueBytes / 2];  // [token][low or high nibble's dimensions]
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int token_slot = __shfl_sync(kAllLanes, slot, tile * kTileTokens + value_row(lane, r));
    load_pool(pool.values, pool.value_stride, token_slot, L::value_dim(lane, 0, false), words[r][0]);
    load_pool(pool.values, pool.value_stride, token_slot, L::value_dim(lane, 0, true), words[r][1]);
  }
  float scores[1][HeadTiles][4] = {};
#pragma unroll
  for (int s = 0; s < L::kKeySteps; ++s) {
    const int load = s / 2, word = s % 2 * 2;
    const FragmentA a{{first[load][word], second[load][word], first[load][word + 1], second[load][word + 1]}};
#pragma unroll
    for (int n = 0; n < HeadTiles; ++n) mma::multiply_add<false>(scores[0][n], a, query.step[n][s]);
  }
  scale_scores(scores[0], mask, row, score_factor, score_factor);
  running.weigh(scores);
  FragmentB weights[HeadTiles];
  weights_operand(scores[0], 1.0f, 1.0f, weights);
#pragma unroll
  for (int m = 0; m < L::kValueTiles; ++m) {
    const int word = m / 2, half = m % 2;
    const FragmentA a{{pair_halves(words[0][0][word], words[1][0][word], half),
                       pair_halves(words[0][1][word], words[1][1][word], half),
                       pair_halves(words[2][0][word], words[3][0][word], half),
                       pair_halves(words[2][1][word], words[3][1][word], half)}};
    running.add_values(m, a, weights);
  }
}

}  // namespace sglang_er::cuda
