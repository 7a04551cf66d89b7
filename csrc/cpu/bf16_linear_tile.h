// The inner part of bf16_linear: one slice of K, of up to kBlockRows rows of W times one tile of x.
//
// R rows of W times T rows of x are in registers at a time. While a tile is in L1, everything that it meets
// of W comes from L2 (or, where the instruction set says so, from L1): prefetched by earlier calls.
//
// The sums of an output lie in sixteen lanes. Behind the last slice the R rows of W fold their vectors into
// one, which overlaps with the dot products of the next R rows; the rest is added up when the block is
// stored.
//
// An instruction set P says: kDot, it has dot products of bf16 pairs; kMaxTile, the most rows of x in a tile;
// rows_at_once(T), R; kStripeRows, see bf16_linear.h; prefetches(T), whether this code prefetches at all;
// kNear, whether it prefetches into L1 where x is one tile, lead(T, whole) rows of W ahead (else, and with
// more tiles: the same rows of the slice that follows, into L2); follows(T), whether it then asks for whole
// rows in the order of memory; unrolls(T), two steps at a time.
//
// Included by bf16_linear.h; everything is local to the translation unit (anonymous namespace).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bf16_linear_op.h"
#include "sum16.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

constexpr int kStep = 2 * kLanes;  // inputs that one step takes of each row of W
constexpr int kBlockRows = 16;     // outputs that are stored as one vector

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
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weights[r] = P::load_pairs(weight + r * stride);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const typename P::Pairs inputs = P::load_pairs(x + t * kStep);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][t] = P::dot(acc[r][t], weights[r], inputs);
    }
  } else {
    half_step<P, 0>(acc, weight, stride, x);
    half_step<P, 1>(acc, weight, stride, x);
  }
}

// Into L1, or into L2 only.
template <bool kNear, class W>
SGLANG_ER_INLINE void prefetch_step(const W* weights) {
  __builtin_prefetch(weights, 0, kNear ? 3 : 2);
  if constexpr (sizeof(W) == 4) __builtin_prefetch(weights + kLanes, 0, kNear ? 3 : 2);
}

// Inputs [first, first + count).
struct Slice {
  int64_t first, count;
  bool last;

  bool whole() const { return first == 0 && last; }
};

// What a step prefetches: lines of W from `at` on, `apart` from each other. The next step's lie `step`
// behind.
template <class W>
struct Ahead {
  const W* at;
  int64_t apart, step;
};

// The sums of row `row` of a block of W and row t of a tile of x.
SGLANG_ER_INLINE float* place(float* sums, int t, int row) { return sums + (t * kBlockRows + row) * kLanes; }

// Adds a slice of R rows of W times T rows of x to their sums, and prefetches kLines lines a step. kFold:
// behind the last slice the R vectors of a row of x become one, in the place of the first. The loops over
// sums are unrolled by name: GCC would keep the sums on the stack between them.
template <class P, int T, int R, int kLines, bool kFold, class W>
void accumulate(const W* weight, int64_t stride, Slice slice, const PanelX<P, W>* x, float* sums,
                Ahead<W> ahead) {
  Floats acc[R][T];
  if (slice.first == 0) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][t] = zero();
    }
  } else {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][t] = load(place(sums, t, r));
    }
  }
  int64_t k = 0;
  const auto step = [&]() __attribute__((always_inline)) {
    for (int line = 0; line < kLines; ++line)
      prefetch_step<(kLines == R && P::kNear)>(ahead.at + line * ahead.apart);
    ahead.at += ahead.step;
    add_step<P>(acc, weight + k, stride, x);
    k += kStep;
    x += T * kStep;
  };
  if constexpr (P::unrolls(T)) {
    while (k + 2 * kStep <= slice.count) {
      step();
      step();
    }
  }
  while (k + kStep <= slice.count) step();
  if (k < slice.count) {
    alignas(64) W padded[R * kStep] = {};
    for (int r = 0; r < R; ++r)
      std::memcpy(padded + r * kStep, weight + r * stride + k,
                  static_cast<size_t>(slice.count - k) * sizeof(W));
    add_step<P>(acc, padded, kStep, x);
  }
  if constexpr (kFold) {
    if (slice.last) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        Floats rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) rows[r] = acc[r][t];
        store(place(sums, t, 0), fold<R>(rows));
      }
      return;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(place(sums, t, r), acc[r][t]);
  }
}

// A block of W: rows [first, first + rows), at most kBlockRows.
struct Block {
  int64_t first;
  int rows;
};

// Rows [first, first + rows) of x.
template <class X>
struct Tile {
  const X* x;
  int64_t first;
  int64_t number, count;  // of all tiles
};

template <class P, int F, class Out, class Bias>
void store_rows(const Bf16LinearCall& call, const float* sums, Block block, int64_t first, int rows) {
  const Bias* bias = call.bias == nullptr ? nullptr : static_cast<const Bias*>(call.bias) + block.first;
  Out* out = static_cast<Out*>(call.out) + first * call.out_stride + block.first;
  for (int t = 0; t < rows; ++t, out += call.out_stride, sums += kBlockRows * kLanes) {
    Floats values = sum16<F>(sums);
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

// One slice of a block times one tile: R rows of W at a time, the rest one by one. `weight` is at the slice's
// first input, `next` at what is worked on after this block: its first rows are prefetched (P::kNear), or,
// row by row, the same rows of it, each by one of the tiles.
template <class P, int T, class W>
void slice_tile(const Bf16LinearCall& call, const W* weight, Block block, Slice slice,
                const Tile<PanelX<P, W>>& tile, float* sums, const W* next) {
  constexpr int R = P::rows_at_once(T);
  constexpr int F = kFolds ? R : 1;  // rows of W to a vector of sums
  static_assert(kBlockRows % R == 0);
  const int64_t stride = call.weight_stride;
  if (slice.last) {  // the lines that will be stored may be another core's
    const int64_t bytes = element_bytes(call.out_type);
    const char* out =
        static_cast<const char*>(call.out) + (tile.first * call.out_stride + block.first) * bytes;
    for (int t = 0; t < T; ++t) __builtin_prefetch(out + t * call.out_stride * bytes, 1);
  }
  int row = 0;
  const auto all_rows = [&](auto lines, const auto& ahead) {
    for (; row + R <= block.rows; row += R)
      accumulate<P, T, R, decltype(lines)::value, (F > 1)>(weight + row * stride, stride, slice, tile.x,
                                                           place(sums, 0, row), ahead(row));
  };
  const int share = static_cast<int>((R + tile.count - 1) / tile.count);
  const auto far = [&](int at) {
    return Ahead<W>{next + (at + tile.number * share) * stride, stride, kStep};
  };
  if (!P::prefetches(T) || tile.number * share >= R) {
    all_rows(std::integral_constant<int, 0>{}, far);
  } else if (share == R) {
    if constexpr (P::kNear) {
      const int lead = P::lead(T, slice.whole()) < block.rows ? P::lead(T, slice.whole()) : block.rows;
      const bool follows = P::follows(T) && slice.whole();
      const auto near = [&](int at) {
        const W* row =
            at + lead < block.rows ? weight + (at + lead) * stride : next + (at + lead - block.rows) * stride;
        return follows ? Ahead<W>{row, kStep, R * kStep} : Ahead<W>{row, stride, kStep};
      };
      all_rows(std::integral_constant<int, R>{}, near);
    } else {
      all_rows(std::integral_constant<int, R>{}, far);
    }
  } else if (share == 2 && R > 2) {
    all_rows(std::integral_constant<int, 2>{}, far);
  } else {
    all_rows(std::integral_constant<int, 1>{}, far);
  }
  if (row < block.rows) {
    [[maybe_unused]] const int whole = row;
    for (; row < block.rows; ++row)
      accumulate<P, T, 1, 0, false>(weight + row * stride, stride, slice, tile.x, place(sums, 0, row),
                                    Ahead<W>{next, 0, 0});
    if constexpr (F > 1) {
      for (int t = 0; slice.last && t < T; ++t) {
        Floats rows[R];
        for (int r = 0; r < R; ++r)
          rows[r] = whole + r < block.rows ? load(place(sums, t, whole + r)) : zero();
        store(place(sums, t, whole), fold<R>(rows));
      }
    }
  }
  if (!slice.last) return;
  with_type(call.out_type, [&](auto* out) {
    with_type(call.bias_type, [&](auto* bias) {
      store_rows<P, F, std::remove_pointer_t<decltype(out)>, std::remove_pointer_t<decltype(bias)>>(
          call, sums, block, tile.first, T);
    });
  });
}

template <class P, class W, int T = P::kMaxTile, class... Args>
void slice_tile_of(int tile_rows, const Args&... args) {
  if constexpr (T > 1) {
    if (tile_rows < T) return slice_tile_of<P, W, T - 1>(tile_rows, args...);
  }
  slice_tile<P, T, W>(args...);
}

}  // namespace
}  // namespace sglang_er::cpu
