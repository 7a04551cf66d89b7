// out[M, N] = x[M, K] @ W[N, K]^T + bias with W as the model stores it (row-major bf16, fp16 or fp32), fp32
// accumulation.
//
// Bound: weight bytes up to M = 8 or so, then the FMA units. W is not prepacked: nothing to keep in memory
// twice, nothing to repack when weights change, never stale. Rows lie along K, so K goes into the lanes: an
// accumulator holds 16 partial sums of one output, added up at the very end.
//
// Who computes what: a thread takes kBlockRows rows of W and walks them in slices of K. A slice of the block
// comes from memory once, stays in L2 and serves every tile of T rows of x; R rows of W times T rows of x are
// in registers at a time, and each vector of W, once converted to fp32, serves T rows. The first touch is
// spread: tile t of the current slice prefetches its share of the slice that follows, unless the machine's
// own prefetching is better (P::prefetches).
// x is rearranged once per call into tiles [step of 32 inputs][T][32] of fp32. Where a step of W converts
// cheaper as even and odd inputs (bf16: one shift or mask for two inputs), x lies the same way. An
// instruction set with dot products of bf16 pairs (P::kDot) takes W as it is and x rounded to bf16.
//
// A sum's lanes and order are the same whatever the other rows, slices and threads are: a row's result does
// not depend on them.
//
// Included by one translation unit per instruction set; everything is local to it (anonymous namespace).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bf16_linear_op.h"
#include "parallel.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

constexpr int kStep = 2 * kLanes;    // inputs that one step takes of each row of W
constexpr int64_t kSliceSteps = 32;  // 2 KiB of a bf16 row, 24 KiB of an fp32 tile of x: several fit L1
constexpr int kBlockRows = 16;
// Rows of x in a pass. The sums of a block are on the stack, 64 KiB; x must stay in L2: once it does not,
// reading W a second time is cheaper (measured at K = 8960, M = 64: 2.3 MB of x cost a tenth).
constexpr int kMaxRows = 64;
constexpr int64_t kPanelBytes = 1280 << 10;

// W enters dot products of bf16 pairs, without conversion.
template <class P, class W>
constexpr bool dots = P::kDot && std::is_same_v<W, BFloat16>;
// Elements of a tile of x.
template <class P, class W>
using PanelX = std::conditional_t<dots<P, W>, BFloat16, float>;

// One half of a step of 32 weights as fp32 lanes. `split<W>`: half h holds inputs 2i + h, else 16h + i.
template <class W>
constexpr bool split = std::is_same_v<W, BFloat16>;
template <class P, int kHalf, class W>
SGLANG_ER_INLINE Floats load_half(const W* weights) {
  if constexpr (split<W>) {
    return kHalf == 0 ? P::even(weights) : P::odd(weights);
  } else {
    return load(weights + kHalf * kLanes);
  }
}

template <class X>
struct Panel {
  X* x;
  int64_t row_elements;  // K padded to kStep

  X* tile(int64_t first_row) const { return x + first_row * row_elements; }
};

// First row of tile t when m rows are cut into `tiles` tiles of nearly equal size.
SGLANG_ER_INLINE int64_t tile_start(int64_t m, int64_t tiles, int64_t t) { return m * t / tiles; }

template <class P, class W, class X>
void fill_tile(const Bf16LinearCall& call, const Panel<PanelX<P, W>>& panel, int64_t first_row, int rows) {
  for (int row = 0; row < rows; ++row) {
    const X* source = static_cast<const X*>(call.x) + (first_row + row) * call.x_stride;
    PanelX<P, W>* target = panel.tile(first_row) + row * kStep;
    for (int64_t k = 0; k < call.k; k += kStep, target += rows * kStep) {
      float values[kStep];
      const int64_t left = call.k - k;
      if (left >= kStep) {
        store(values, load(source + k));
        store(values + kLanes, load(source + k + kLanes));
      } else {
        const int first = static_cast<int>(left < kLanes ? left : kLanes);
        store(values, load_first(source + k, first));
        store(values + kLanes, load_first(source + k + first, static_cast<int>(left) - first));
      }
      if constexpr (dots<P, W>) {
        P::store_rounded(target, values);
      } else if constexpr (split<W>) {
        for (int i = 0; i < kLanes; ++i) target[i] = values[2 * i];
        for (int i = 0; i < kLanes; ++i) target[kLanes + i] = values[2 * i + 1];
      } else {
        std::memcpy(target, values, sizeof(values));
      }
    }
  }
}

template <class P, int kHalf, int T, int R, class W>
SGLANG_ER_INLINE void half_step(Floats (&acc)[R][T], const W* weight, int64_t stride, const float* x) {
  Floats inputs[T];
  for (int t = 0; t < T; ++t) {
    inputs[t] = load(x + t * kStep + kHalf * kLanes);
    P::hold(inputs[t]);
  }
  for (int r = 0; r < R; ++r) {
    const Floats weights = load_half<P, kHalf>(weight + r * stride);
    for (int t = 0; t < T; ++t) acc[r][t] = fma(weights, inputs[t], acc[r][t]);
  }
}

// Adds a step of 32 inputs: R rows of W times T rows of x.
template <class P, int T, int R, class W>
SGLANG_ER_INLINE void add_step(Floats (&acc)[R][T], const W* weight, int64_t stride, const PanelX<P, W>* x) {
  if constexpr (dots<P, W>) {
    typename P::Pairs weights[R];
    for (int r = 0; r < R; ++r) weights[r] = P::load_pairs(weight + r * stride);
    for (int t = 0; t < T; ++t) {
      const typename P::Pairs inputs = P::load_pairs(x + t * kStep);
      for (int r = 0; r < R; ++r) acc[r][t] = P::dot(acc[r][t], weights[r], inputs);
    }
  } else {
    half_step<P, 0>(acc, weight, stride, x);
    half_step<P, 1>(acc, weight, stride, x);
  }
}

// What a call prefetches while it works: the same inputs of rows first..last, `offset` elements further on.
struct Ahead {
  int64_t offset;
  int first, last;
};

template <class W>
SGLANG_ER_INLINE void prefetch_step(const W* weights) {
  __builtin_prefetch(weights, 0, 2);
  if constexpr (sizeof(W) == 4) __builtin_prefetch(weights + kLanes, 0, 2);
}

// Adds inputs [0, count) of R rows of W times T rows of x to sums[t][r][16].
template <class P, int T, int R, class W>
void accumulate(const W* weight, int64_t stride, int64_t count, const PanelX<P, W>* x, float* sums,
                bool fresh, Ahead ahead) {
  Floats acc[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) acc[r][t] = fresh ? zero() : load(sums + (t * kBlockRows + r) * kLanes);
  }
  const W* next = weight + ahead.first * stride + ahead.offset;
  const int lines = P::prefetches(T) ? ahead.last - ahead.first : 0;
  int64_t k = 0;
#pragma GCC unroll 2
  for (; k + kStep <= count; k += kStep, x += T * kStep) {
    if (lines == R) {  // a known number: without a loop of its own, which cost a sixth at M = 1
      for (int line = 0; line < R; ++line) prefetch_step(next + line * stride + k);
    } else {
      for (int line = 0; line < lines; ++line) prefetch_step(next + line * stride + k);
    }
    add_step<P>(acc, weight + k, stride, x);
  }
  if (k < count) {
    alignas(64) W padded[R * kStep] = {};
    for (int r = 0; r < R; ++r)
      std::memcpy(padded + r * kStep, weight + r * stride + k, static_cast<size_t>(count - k) * sizeof(W));
    add_step<P>(acc, padded, kStep, x);
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) store(sums + (t * kBlockRows + r) * kLanes, acc[r][t]);
  }
}

// A block of W: rows [first, first + rows), at most kBlockRows.
struct Block {
  int64_t first;
  int rows;
};

// One slice of a block times one tile of x: R rows of W at a time, the rest one by one.
template <class P, int T, class W>
void slice_tile(const W* weight, int64_t stride, int rows, int64_t count, const PanelX<P, W>* x, float* sums,
                bool fresh, int64_t ahead, int64_t tile, int64_t tiles) {
  constexpr int R = P::rows_at_once(T);
  static_assert(kBlockRows % R == 0);
  int row = 0;
  for (; row + R <= rows; row += R) {
    const Ahead share{ahead, static_cast<int>(R * tile / tiles), static_cast<int>(R * (tile + 1) / tiles)};
    accumulate<P, T, R>(weight + row * stride, stride, count, x, sums + row * kLanes, fresh, share);
  }
  for (; row < rows; ++row)
    accumulate<P, T, 1>(weight + row * stride, stride, count, x, sums + row * kLanes, fresh, {0, 0, 0});
}

template <class P, class W, int T = P::kMaxTile, class... Args>
void slice_tile_of(int tile_rows, const Args&... args) {
  if constexpr (T > 1) {
    if (tile_rows < T) return slice_tile_of<P, W, T - 1>(tile_rows, args...);
  }
  slice_tile<P, T, W>(args...);
}

template <class P, class Out, class Bias>
void store_rows(const Bf16LinearCall& call, const float* sums, Block block) {
  const Bias* bias = call.bias == nullptr ? nullptr : static_cast<const Bias*>(call.bias) + block.first;
  for (int64_t row = 0; row < call.m; ++row, sums += kBlockRows * kLanes) {
    Out* out = static_cast<Out*>(call.out) + row * call.out_stride + block.first;
    Floats values = P::sum16(sums);
    if (block.rows == kBlockRows) {
      if (bias != nullptr) values = add(values, load(bias));
      store(out, values);
    } else {
      float lanes[kLanes];
      store(lanes, values);
      for (int n = 0; n < block.rows; ++n)
        store_float(out + n, bias == nullptr ? lanes[n] : lanes[n] + to_float(bias[n]));
    }
  }
}

template <class P, class W>
void compute_block(const Bf16LinearCall& call, const Panel<PanelX<P, W>>& panel, Block block) {
  alignas(64) float sums[kMaxRows * kBlockRows * kLanes];
  const int64_t tiles = (call.m + P::kMaxTile - 1) / P::kMaxTile;
  const W* weight = static_cast<const W*>(call.weight) + block.first * call.weight_stride;
  const int64_t steps = (call.k + kStep - 1) / kStep;
  const int64_t slices = steps > kSliceSteps ? (steps + kSliceSteps - 1) / kSliceSteps : 1;
  int64_t k = 0;
  for (int64_t slice = 0; slice < slices; ++slice) {  // once for K = 0 too: sums of nothing
    // Of nearly equal size: each prefetches as much as it works on, and the next one needs that much.
    const int64_t end = slice + 1 == slices ? call.k : steps * (slice + 1) / slices * kStep;
    // After the last slice comes the first one of the next block.
    const int64_t ahead = end == call.k ? block.rows * call.weight_stride - k : end - k;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = tile_start(call.m, tiles, t);
      const int rows = static_cast<int>(tile_start(call.m, tiles, t + 1) - first);
      slice_tile_of<P, W>(rows, weight + k, call.weight_stride, block.rows, end - k,
                          panel.tile(first) + k * rows, sums + first * kBlockRows * kLanes, k == 0, ahead, t,
                          tiles);
    }
    k = end;
  }
  with_type(call.out_type, [&](auto* out) {
    with_type(call.bias_type, [&](auto* bias) {
      store_rows<P, std::remove_pointer_t<decltype(out)>, std::remove_pointer_t<decltype(bias)>>(call, sums,
                                                                                                 block);
    });
  });
}

// At most kMaxRows rows of x.
template <class P, class W>
void run_pass(const Bf16LinearCall& call) {
  using X = PanelX<P, W>;
  Panel<X> panel{};
  panel.row_elements = (call.k + kStep - 1) / kStep * kStep;
  const int64_t x_bytes = call.m * panel.row_elements * static_cast<int64_t>(sizeof(X));
  panel.x = static_cast<X*>(scratch(static_cast<size_t>(x_bytes)));
  const int64_t tiles = (call.m + P::kMaxTile - 1) / P::kMaxTile;
  parallel_for(tiles, threads_for(call.threads, x_bytes), [&](int64_t t) {
    const int64_t first = tile_start(call.m, tiles, t);
    const int rows = static_cast<int>(tile_start(call.m, tiles, t + 1) - first);
    with_type(call.x_type, [&](auto* x) {
      fill_tile<P, W, std::remove_pointer_t<decltype(x)>>(call, panel, first, rows);
    });
  });

  const int64_t bytes = call.n * call.k * static_cast<int64_t>(sizeof(W));
  const int threads = threads_for(call.threads, bytes * call.m);  // rows cost about as much as bytes
  int64_t height = kBlockRows;
  while (height > 4 && call.n < 4 * height * threads) height /= 2;
  parallel_for((call.n + height - 1) / height, threads, [&](int64_t unit) {
    const int64_t first = unit * height;
    const int64_t left = call.n - first;
    compute_block<P, W>(call, panel, {first, static_cast<int>(left < height ? left : height)});
  });
}

template <class P>
void run_bf16_linear(const Bf16LinearCall& call) {
  const int64_t fit = kPanelBytes / (4 * (call.k + 1));
  const int64_t rows = fit > kMaxRows ? kMaxRows : fit < P::kMaxTile ? P::kMaxTile : fit;
  const int64_t passes = (call.m + rows - 1) / rows;
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t first = tile_start(call.m, passes, i);
    Bf16LinearCall pass = call;
    pass.m = tile_start(call.m, passes, i + 1) - first;
    pass.x = static_cast<const char*>(call.x) + first * call.x_stride * element_bytes(call.x_type);
    pass.out = static_cast<char*>(call.out) + first * call.out_stride * element_bytes(call.out_type);
    with_type(call.weight_type,
              [&](auto* weight) { run_pass<P, std::remove_pointer_t<decltype(weight)>>(pass); });
  }
}

// The sums of sixteen vectors that lie one after the other.
SGLANG_ER_INLINE Floats sum16_one_by_one(const float* vectors) {
  float sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = sum(load(vectors + i * kLanes));
  return load(sums);
}

}  // namespace
}  // namespace sglang_er::cpu
