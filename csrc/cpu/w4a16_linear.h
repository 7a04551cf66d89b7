// out[M, N] = x[M, K] @ W[N, K]^T + bias with int4 W and full-precision x (W4A16), fp32 accumulation.
//
// Bound: weight bytes. At M = 1 every packed byte is read once and used once, so the aim is sustained read
// bandwidth; every further row of x adds N*K products but no weight bytes, until the FMA units are the limit.
//
// Who computes what: a thread takes a unit of row blocks (16 outputs each) and all of K. For up to 8 rows of
// x and R row blocks it keeps acc[row][block] in registers; a packed word is turned into operands (16 lanes
// of q) once and used for every row, with x broadcast from memory. The scale and zero are applied per group:
//   sum_k x_k*(q_k*s + z) = s * sum_k x_k*q_k + z * sum_k x_k
// where sum_k x_k comes from the panel, made once per call. A policy may use operands that are q + kOffset
// (cheaper to make); the offset is taken back with the same sum.
//
// A row's arithmetic is the same whatever the other rows are: its result does not depend on M or on threads.
//
// Included by one translation unit per instruction set; everything is local to it (anonymous namespace).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"
#include "parallel.h"
#include "sglang_er/packed_weight.h"
#include "w4a16_linear_op.h"

namespace sglang_er::cpu {
namespace {

constexpr int kMaxBlocksPerUnit = 4;
constexpr int64_t kPrefetchBytes = 2048;

SGLANG_ER_INLINE void prefetch(const void* address) { __builtin_prefetch(address); }

// Activations rearranged for the kernel: for a tile of T rows, elements [group][word][operand][T], so the
// kernel reads them front to back, and the sums of x over each group, [group][T]. Padding is zero.
template <class P>
struct Panel {
  using X = typename P::X;
  X* x;
  float* sums;
  int64_t row_elements;  // per row of x
  int64_t groups;

  X* tile_x(int64_t first_row) const { return x + first_row * row_elements; }
  float* tile_sums(int64_t first_row) const { return sums + first_row * groups; }
};

// First row of tile t when m rows are cut into `tiles` tiles of nearly equal size.
SGLANG_ER_INLINE int64_t tile_start(int64_t m, int64_t tiles, int64_t t) { return m * t / tiles; }

template <class P, class T>
void fill_tile(const W4A16Call& call, const Panel<P>& panel, int64_t first_row, int rows) {
  const int group_size = call.shape.group_size;
  const int words = call.shape.words();
  float values[kMaxGroupSize];
  for (int row = 0; row < rows; ++row) {
    const T* source = static_cast<const T*>(call.x) + (first_row + row) * call.x_stride;
    for (int64_t group = 0; group < panel.groups; ++group) {
      const int64_t begin = group * group_size;
      const int64_t left = call.shape.cols - begin;
      const int valid = left < group_size ? static_cast<int>(left) : group_size;
      for (int k = 0; k < valid; ++k) values[k] = to_float(source[begin + k]);
      for (int k = valid; k < group_size; ++k) values[k] = 0.0f;
      float partial[16] = {};
      for (int k = 0; k < group_size; k += 16) {
        for (int lane = 0; lane < 16; ++lane) partial[lane] += values[k + lane];
      }
      float sum = 0.0f;
      for (float part : partial) sum += part;
      panel.tile_sums(first_row)[group * rows + row] = sum;
      auto* elements = panel.tile_x(first_row) + group * words * P::kOperands * rows + row;
      P::fill_group(values, group_size, elements, rows);
    }
  }
}

// Accumulates R row blocks for T rows of x over all of K into result[T][R][16].
template <class P, int T, int R>
void accumulate(const W4A16Call& call, int64_t first_block, const typename P::X* x, const float* sums,
                float* result) {
  const PackedShape& shape = call.shape;
  const int64_t block_bytes = shape.block_bytes();
  const int64_t block_meta = shape.block_meta();
  const int words = shape.words();
  const uint8_t* packed = call.packed + first_block * block_bytes;
  const uint8_t* const first = packed;
  const uint16_t* meta = call.scales_zeros + first_block * block_meta;
  const int64_t meta_ahead = R * block_meta;

  typename P::Lanes total[T][R];
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) total[t][r] = P::zero();
  }
  for (int64_t group = 0; group < shape.groups(); ++group) {
    typename P::Lanes acc[T][R];
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) acc[t][r] = P::zero();
    }
    // Past the end of these blocks come the R that are next; the rows' streams are too short to warm up anew.
    const bool wraps = packed + kPrefetchBytes >= first + block_bytes;
    const int64_t ahead = kPrefetchBytes + (wraps ? (R - 1) * block_bytes : 0);
    for (int r = 0; r < R; ++r) prefetch(meta + r * block_meta + meta_ahead);
    for (int word = 0; word < words; ++word) {
      typename P::Words raw[R];
      for (int r = 0; r < R; ++r) {
        prefetch(packed + r * block_bytes + ahead);
        raw[r] = P::load(packed + r * block_bytes);
      }
      P::template for_each_operand<R>(raw, [&](int operand, int r, const auto& weights) {
        for (int t = 0; t < T; ++t) acc[t][r] = P::multiply_add(acc[t][r], weights, x + operand * T + t);
      });
      packed += kWordBytes;
      x += P::kOperands * T;
    }
    for (int r = 0; r < R; ++r) {
      const auto scale = P::load_bf16(meta + r * block_meta);
      const auto zero = P::shift_zero(P::load_bf16(meta + r * block_meta + kRowBlock), scale);
      for (int t = 0; t < T; ++t) {
        total[t][r] = P::fma(scale, acc[t][r], total[t][r]);
        total[t][r] = P::fma(zero, P::broadcast(sums[t]), total[t][r]);
      }
    }
    meta += 2 * kRowBlock;
    sums += T;
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) P::store(result + (t * R + r) * kRowBlock, total[t][r]);
  }
}

template <class Out, class Bias>
void store_rows(const W4A16Call& call, const float* result, int64_t first_row, int rows, int64_t first_block,
                int blocks) {
  const int64_t first = first_block * kRowBlock;
  const int64_t left = call.shape.rows - first;
  const int width = left < blocks * kRowBlock ? static_cast<int>(left) : blocks * kRowBlock;
  const Bias* bias = call.bias == nullptr ? nullptr : static_cast<const Bias*>(call.bias) + first;
  for (int row = 0; row < rows; ++row) {
    Out* out = static_cast<Out*>(call.out) + (first_row + row) * call.out_stride + first;
    const float* values = result + row * blocks * kRowBlock;
    if (bias == nullptr) {
      for (int n = 0; n < width; ++n) store_float(out + n, values[n]);
    } else {
      for (int n = 0; n < width; ++n) store_float(out + n, values[n] + to_float(bias[n]));
    }
  }
}

template <class P, int T, int R>
void compute_blocks(const W4A16Call& call, const Panel<P>& panel, int64_t first_row, int64_t first_block) {
  alignas(64) float result[T * R * kRowBlock];
  accumulate<P, T, R>(call, first_block, panel.tile_x(first_row), panel.tile_sums(first_row), result);
  with_type(call.x_type, [&](auto* out) {
    with_type(call.bias_type, [&](auto* bias) {
      using Out = std::remove_pointer_t<decltype(out)>;
      using Bias = std::remove_pointer_t<decltype(bias)>;
      store_rows<Out, Bias>(call, result, first_row, T, first_block, R);
    });
  });
}

// One tile of x against the blocks of a unit: R at a time, the rest one by one.
template <class P, int T>
void compute_tile(const W4A16Call& call, const Panel<P>& panel, int64_t first_row, int64_t block,
                  int64_t end) {
  constexpr int kBlocks = P::blocks_at_once(T);
  static_assert(kBlocks <= kMaxBlocksPerUnit);
  for (; block + kBlocks <= end; block += kBlocks)
    compute_blocks<P, T, kBlocks>(call, panel, first_row, block);
  for (; block < end; ++block) compute_blocks<P, T, 1>(call, panel, first_row, block);
}

template <class P, int T = P::kMaxTile>
void compute_tile_of(int rows, const W4A16Call& call, const Panel<P>& panel, int64_t first_row, int64_t block,
                     int64_t end) {
  if constexpr (T > 1) {
    if (rows < T) return compute_tile_of<P, T - 1>(rows, call, panel, first_row, block, end);
  }
  compute_tile<P, T>(call, panel, first_row, block, end);
}

// Row blocks per unit: many units for balance, but wide enough for several streams and operand reuse.
SGLANG_ER_INLINE int64_t blocks_per_unit(int64_t row_blocks, int threads) {
  int64_t blocks = kMaxBlocksPerUnit;
  while (blocks > 1 && row_blocks < 4 * blocks * threads) blocks /= 2;
  return blocks;
}

template <class P>
void run_w4a16_linear(const W4A16Call& call) {
  const PackedShape& shape = call.shape;
  const int64_t m = call.m;
  Panel<P> panel{};
  panel.groups = shape.groups();
  panel.row_elements = panel.groups * shape.words() * P::kOperands;
  const size_t x_bytes = m * panel.row_elements * sizeof(typename P::X);
  auto* memory = static_cast<char*>(scratch(x_bytes + m * panel.groups * sizeof(float)));
  panel.x = reinterpret_cast<typename P::X*>(memory);
  panel.sums = reinterpret_cast<float*>(memory + x_bytes);

  const int64_t tiles = (m + P::kMaxTile - 1) / P::kMaxTile;
  const auto fill = [&](int64_t t) {
    const int64_t first = tile_start(m, tiles, t);
    const int rows = static_cast<int>(tile_start(m, tiles, t + 1) - first);
    with_type(call.x_type,
              [&](auto* x) { fill_tile<P, std::remove_pointer_t<decltype(x)>>(call, panel, first, rows); });
  };
  parallel_for(tiles, threads_for(call.threads, static_cast<int64_t>(x_bytes)), fill);

  const int threads =
      threads_for(call.threads, shape.packed_bytes() * m);  // rows cost about as much as bytes
  const int64_t blocks = blocks_per_unit(shape.row_blocks(), threads);
  const int64_t units = (shape.row_blocks() + blocks - 1) / blocks;
  const auto compute = [&](int64_t unit) {
    const int64_t begin = unit * blocks;
    const int64_t end = begin + blocks < shape.row_blocks() ? begin + blocks : shape.row_blocks();
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = tile_start(m, tiles, t);
      const int rows = static_cast<int>(tile_start(m, tiles, t + 1) - first);
      compute_tile_of<P>(rows, call, panel, first, begin, end);
    }
  };
  parallel_for(units, threads, compute);
}

}  // namespace
}  // namespace sglang_er::cpu
