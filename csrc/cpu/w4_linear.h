// The loops of the linear ops with packed int4 weights: out[M, N] = x[M, K] @ W[N, K]^T + bias.
//
// Who computes what: a thread takes a unit of row blocks (16 outputs each) and all of K. For a tile of T rows
// of x and R row blocks it keeps acc[T][R] in registers; a packed word is turned into operands (16 lanes of
// q) once and used for every row, with x broadcast from a panel that is prepared once per call. Scale and
// zero are applied per group:
//   sum_k x_k*(q_k*s + z) = s * sum_k x_k*q_k + z * sum_k x_k
//
// A row's arithmetic is the same whatever the other rows are: its result does not depend on M or on threads.
//
// What a product is comes from a policy P (w4a16_linear.h, w4a8_linear.h):
//   X, kElements               a prepared activation; how many of them meet the 8 weights of a word
//   kTerms                     floats per row and group that finish() wants beside the accumulator
//   kMaxTile, blocks_at_once   the register tile: the largest T, and R for a T
//   prefetch_bytes(T)          of the words of each row block, so many are fetched ahead
//   kRowsPerSweep              rows of x whose arithmetic costs about as much as reading the weight
//   Acc, kWordsPerStep, step   acc[t][r] += the products of kWordsPerStep words (a divisor of 4)
//   finish                     the running total with one group's accumulator, scale, zero and terms added
//   fill_group                 one row's group of activations into the panel, and its terms
//
// Included by one translation unit per instruction set; everything is local to it (anonymous namespace).
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"
#include "parallel.h"
#include "sglang_er/packed_weight.h"
#include "vec.h"
#include "w4_linear_op.h"

namespace sglang_er::cpu {
namespace {

SGLANG_ER_INLINE void prefetch(const void* address) { __builtin_prefetch(address); }

// Running totals are touched once a group: a compiler that holds them in registers across the inner loop has
// too few left for the accumulators.
SGLANG_ER_INLINE void keep_in_memory(float* totals) { asm volatile("" : : "r"(totals) : "memory"); }

// R row blocks of packed words, read side by side.
struct Streams {
  const uint8_t* packed;
  int64_t block_bytes;
  int64_t ahead;  // what will be read this many bytes later is fetched now

  SGLANG_ER_INLINE const uint8_t* line(int block, int word) const {
    return packed + block * block_bytes + word * kWordBytes;
  }
};

// Activations rearranged for the kernel, [group][kElements of each word and of T rows, in the policy's order]
// for each tile of T rows, so that the kernel reads them front to back; and terms [group][T][kTerms].
// Padding is zero.
template <class P>
struct Panel {
  using X = typename P::X;
  X* x;
  float* terms;
  int64_t row_elements;  // per row of x
  int64_t row_terms;

  X* tile_x(int64_t first_row) const { return x + first_row * row_elements; }
  float* tile_terms(int64_t first_row) const { return terms + first_row * row_terms; }
};

// First row of tile t when m rows are cut into `tiles` tiles of nearly equal size.
SGLANG_ER_INLINE int64_t tile_start(int64_t m, int64_t tiles, int64_t t) { return m * t / tiles; }

// A group of x in fp32, zero from `valid` on: x itself if it can be, else `buffer`.
template <class T>
SGLANG_ER_INLINE const float* as_floats(const T* x, int valid, int group_size, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (valid == group_size) return x;
  }
  int k = 0;
  for (; k + kLanes <= valid; k += kLanes) store(buffer + k, load(x + k));
  for (; k < group_size; k += kLanes) store(buffer + k, k < valid ? load_first(x + k, valid - k) : zero());
  return buffer;
}

template <class P, class T>
void fill_tile(const W4LinearCall& call, const Panel<P>& panel, int64_t first_row, int rows) {
  const int group_size = call.shape.group_size;
  const int64_t group_elements = int64_t{call.shape.words()} * P::kElements * rows;
  alignas(64) float values[kMaxGroupSize];
  for (int row = 0; row < rows; ++row) {
    const T* source = static_cast<const T*>(call.x) + (first_row + row) * call.x_stride;
    auto* x = panel.tile_x(first_row);
    float* terms = panel.tile_terms(first_row) + row * P::kTerms;
    for (int64_t begin = 0; begin < call.shape.cols; begin += group_size) {
      const int64_t left = call.shape.cols - begin;
      const int valid = left < group_size ? static_cast<int>(left) : group_size;
      const float* group = as_floats(source + begin, valid, group_size, values);
      P::fill_group(group, group_size, x, row, rows, terms);
      x += group_elements;
      terms += rows * P::kTerms;
    }
  }
}

// Accumulates R row blocks for T rows of x over all of K into result[T][R][16].
template <class P, int T, int R>
void accumulate(const W4LinearCall& call, int64_t first_block, const typename P::X* x, const float* terms,
                float* result) {
  const PackedShape& shape = call.shape;
  const int64_t block_bytes = shape.block_bytes();
  const int64_t block_meta = shape.block_meta();
  const int steps = shape.words() / P::kWordsPerStep;
  const uint8_t* packed = call.packed + first_block * block_bytes;
  const uint8_t* const first = packed;
  const uint16_t* meta = call.scales_zeros + first_block * block_meta;
  const int64_t meta_ahead = R * block_meta;

  for (int i = 0; i < T * R; ++i) store(result + i * kRowBlock, zero());
  for (int64_t group = 0; group < shape.groups(); ++group) {
    typename P::Acc acc[T][R];
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) acc[t][r] = typename P::Acc{};
    }
    // Past the end of these blocks come the R that are next; the rows' streams are too short to warm up anew.
    constexpr int64_t kPrefetchBytes = P::prefetch_bytes(T);
    const bool wraps = packed + kPrefetchBytes >= first + block_bytes;
    const int64_t ahead = kPrefetchBytes + (wraps ? (R - 1) * block_bytes : 0);
    for (int r = 0; r < R; ++r) prefetch(meta + r * block_meta + meta_ahead);
    for (int step = 0; step < steps; ++step) {
      P::template step<T, R>(Streams{packed, block_bytes, ahead}, x, acc);
      packed += P::kWordsPerStep * kWordBytes;
      x += P::kWordsPerStep * P::kElements * T;
    }
    for (int r = 0; r < R; ++r) {
      const Floats group_scale = load_bf16(meta + r * block_meta);
      const Floats group_zero = load_bf16(meta + r * block_meta + kRowBlock);
      for (int t = 0; t < T; ++t) {
        float* total = result + (t * R + r) * kRowBlock;
        store(total, P::finish(acc[t][r], group_scale, group_zero, terms + t * P::kTerms, load(total)));
      }
    }
    keep_in_memory(result);
    meta += 2 * kRowBlock;
    terms += T * P::kTerms;
  }
}

template <class Out, class Bias>
[[gnu::noinline]] void store_rows(const W4LinearCall& call, const float* result, int64_t first_row, int rows,
                                  int64_t first_block, int blocks) {
  const int64_t first = first_block * kRowBlock;
  const int64_t left = call.shape.rows - first;
  const int width = left < blocks * kRowBlock ? static_cast<int>(left) : blocks * kRowBlock;
  const Bias* bias = call.bias == nullptr ? nullptr : static_cast<const Bias*>(call.bias) + first;
  for (int row = 0; row < rows; ++row) {
    Out* out = static_cast<Out*>(call.out) + (first_row + row) * call.out_stride + first;
    const float* values = result + row * blocks * kRowBlock;
    int n = 0;
    for (; n + kLanes <= width; n += kLanes) {
      const Floats sums = load(values + n);
      store(out + n, bias == nullptr ? sums : add(sums, load(bias + n)));
    }
    for (; n < width; ++n) store_float(out + n, bias == nullptr ? values[n] : values[n] + to_float(bias[n]));
  }
}

template <class P, int T, int R>
void compute_blocks(const W4LinearCall& call, const Panel<P>& panel, int64_t first_row, int64_t first_block) {
  alignas(64) float result[T * R * kRowBlock];
  accumulate<P, T, R>(call, first_block, panel.tile_x(first_row), panel.tile_terms(first_row), result);
  with_type(call.out_type, [&](auto* out) {
    with_type(call.bias_type, [&](auto* bias) {
      using Out = std::remove_pointer_t<decltype(out)>;
      using Bias = std::remove_pointer_t<decltype(bias)>;
      store_rows<Out, Bias>(call, result, first_row, T, first_block, R);
    });
  });
}

// One tile of x against the blocks of a unit: R at a time, the rest one by one.
template <class P, int T>
void compute_tile(const W4LinearCall& call, const Panel<P>& panel, int64_t first_row, int64_t block,
                  int64_t end) {
  constexpr int kBlocks = P::blocks_at_once(T);
  static_assert(kBlocks <= kMaxBlocksPerUnit);
  for (; block + kBlocks <= end; block += kBlocks)
    compute_blocks<P, T, kBlocks>(call, panel, first_row, block);
  for (; block < end; ++block) compute_blocks<P, T, 1>(call, panel, first_row, block);
}

template <class P, int T = P::kMaxTile>
void compute_tile_of(int rows, const W4LinearCall& call, const Panel<P>& panel, int64_t first_row,
                     int64_t block, int64_t end) {
  if constexpr (T > 1) {
    if (rows < T) return compute_tile_of<P, T - 1>(rows, call, panel, first_row, block, end);
  }
  compute_tile<P, T>(call, panel, first_row, block, end);
}

// The first words, for which no loop asks early enough, are fetched while the panel is filled.
template <class P>
SGLANG_ER_INLINE void prefetch_first_words(const W4LinearCall& call, int tile_rows) {
  const int64_t block_bytes = call.shape.block_bytes(), ahead = P::prefetch_bytes(tile_rows);
  const int64_t bytes = ahead < block_bytes ? ahead : block_bytes;
  for (int64_t block = 0; block < P::blocks_at_once(tile_rows) && block < call.shape.row_blocks(); ++block) {
    for (int64_t at = 0; at < bytes; at += kWordBytes) prefetch(call.packed + block * block_bytes + at);
  }
}

template <class P>
void run_w4_linear(const W4LinearCall& call) {
  const PackedShape& shape = call.shape;
  const int64_t m = call.m;
  Panel<P> panel{};
  panel.row_elements = shape.groups() * shape.words() * P::kElements;
  panel.row_terms = shape.groups() * P::kTerms;
  const size_t x_bytes = m * panel.row_elements * sizeof(typename P::X);
  auto* memory = static_cast<char*>(scratch(x_bytes + m * panel.row_terms * sizeof(float)));
  panel.x = reinterpret_cast<typename P::X*>(memory);
  panel.terms = reinterpret_cast<float*>(memory + x_bytes);

  const int64_t tiles = (m + P::kMaxTile - 1) / P::kMaxTile;
  const auto fill = [&](int64_t t) {
    const int64_t first = tile_start(m, tiles, t);
    const int rows = static_cast<int>(tile_start(m, tiles, t + 1) - first);
    with_type(call.x_type,
              [&](auto* x) { fill_tile<P, std::remove_pointer_t<decltype(x)>>(call, panel, first, rows); });
  };
  prefetch_first_words<P>(call, static_cast<int>(tile_start(m, tiles, 1)));
  parallel_for(tiles, threads_for(call.threads, m * shape.cols * element_bytes(call.x_type)), fill);

  const int64_t sweeps = (m + P::kRowsPerSweep - 1) / P::kRowsPerSweep;
  const int threads = threads_for(call.threads, shape.packed_bytes() * sweeps);
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
