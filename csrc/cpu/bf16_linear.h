// out[M, N] = x[M, K] @ W[N, K]^T + bias with W as the model stores it (row-major bf16, fp16 or fp32), fp32
// accumulation.
//
// Bound: weight bytes up to M = 8 or so, then the FMA units. W is not prepacked: nothing to keep in memory
// twice, nothing to repack when weights change, never stale. Rows lie along K, so K goes into the lanes: an
// accumulator holds 16 partial sums of one output, added up at the very end (bf16_linear_tile.h).
//
// Who computes what: a thread takes a stripe of P::kStripeRows rows of W and walks it in slices of K. A slice
// of the stripe comes from memory once, stays in L2 and serves every tile of T rows of x. A tile is brought
// from L2 to L1 once for all rows of the stripe: with bf16 dot products and 16 rows to a stripe that alone
// cost a tenth at M = 32. The small tiles of AVX2 meet 16 rows of W, which stay in L1.
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
#include "bf16_linear_tile.h"
#include "parallel.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

constexpr int64_t kSliceSteps = 32;  // 2 KiB of a bf16 row, 24 KiB of an fp32 tile of x: several fit L1
// Where x is one tile of at most this size, rows of W are read whole: memory likes 4 KiB in a row better than
// 2 KiB of every row (K = 2048: M = 1 by 6 %, 2 by 12 %, 4 by 7 %). Beside 24 KiB too little of W is in L1.
constexpr int64_t kWholePanelBytes = 20 << 10;
// Rows of x in a pass. The sums of a stripe are on the stack, up to 256 KiB; x must stay in L2: once it does
// not, reading W a second time is cheaper (measured at K = 8960, M = 64: 2.3 MB of x cost a tenth).
constexpr int kMaxRows = 64;
constexpr int64_t kPanelBytes = 1280 << 10;

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

// Rows [first, first + rows) of W, at most P::kStripeRows, times all of x.
template <class P, class W>
void compute_stripe(const Bf16LinearCall& call, const Panel<PanelX<P, W>>& panel, int64_t first,
                    int64_t rows) {
  alignas(64) float sums[kMaxRows * P::kStripeRows * kLanes];
  const int64_t stride = call.weight_stride;
  const int64_t tiles = (call.m + P::kMaxTile - 1) / P::kMaxTile;
  const W* weight = static_cast<const W*>(call.weight) + first * stride;
  const int64_t steps = (call.k + kStep - 1) / kStep;
  const bool near = tiles == 1 && P::kNear;  // rows that come soon are prefetched, not a slice ahead
  const int64_t panel_bytes = steps * kStep * call.m * static_cast<int64_t>(sizeof(PanelX<P, W>));
  const bool whole = steps <= kSliceSteps || (near && panel_bytes <= kWholePanelBytes);
  const int64_t slices = whole ? 1 : (steps + kSliceSteps - 1) / kSliceSteps;
  int64_t k = 0;
  for (int64_t s = 0; s < slices; ++s) {  // once for K = 0 too: sums of nothing
    const bool last = s + 1 == slices;
    // Of nearly equal size: each prefetches as much as it works on, and the next one needs that much.
    const int64_t end = last ? call.k : steps * (s + 1) / slices * kStep;
    // After the last slice comes the first one of the next stripe.
    const W* next_slice = last ? weight + rows * stride : weight + end;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t tile_first = tile_start(call.m, tiles, t);
      const int tile_rows = static_cast<int>(tile_start(call.m, tiles, t + 1) - tile_first);
      const Tile<PanelX<P, W>> tile{panel.tile(tile_first) + k * tile_rows, tile_first, t, tiles};
      for (int64_t row = 0; row < rows; row += kBlockRows) {
        const Block block{first + row, static_cast<int>(rows - row < kBlockRows ? rows - row : kBlockRows)};
        const W* here = weight + row * stride + k;
        const W* next = !near                     ? next_slice + row * stride
                        : row + kBlockRows < rows ? here + kBlockRows * stride
                                                  : next_slice;
        // A stripe in one slice adds up and stores block by block, in the same place.
        float* block_sums = slices == 1 ? sums : sums + (row * call.m + tile_first * kBlockRows) * kLanes;
        slice_tile_of<P, W>(tile_rows, call, here, block, Slice{k, end - k, last}, tile, block_sums, next);
      }
    }
    k = end;
  }
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
  int64_t height = P::kStripeRows;
  while (height > 4 && call.n < 4 * height * threads) height /= 2;
  parallel_for((call.n + height - 1) / height, threads, [&](int64_t unit) {
    const int64_t first = unit * height;
    const int64_t left = call.n - first;
    compute_stripe<P, W>(call, panel, first, left < height ? left : height);
  });
}

template <class P>
void run_bf16_linear(const Bf16LinearCall& call) {
  const int64_t fit = kPanelBytes / (4 * (call.k + 1));
  const int64_t rows = fit > kMaxRows ? kMaxRows : fit < P::kMaxTile ? P::kMaxTile : fit;
  in_passes(call, rows, [](const Bf16LinearCall& pass) {
    with_type(pass.weight_type,
              [&](auto* weight) { run_pass<P, std::remove_pointer_t<decltype(weight)>>(pass); });
  });
}

}  // namespace
}  // namespace sglang_er::cpu
