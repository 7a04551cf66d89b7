// bf16_linear of bf16 weights on tiles (Intel AMX): out^T = W x^T, 16 rows of W times 16 rows of x times 32
// inputs an instruction.
//
// Bound: weight bytes up to 64 rows of x or so, then loads of x from L2 (19 bytes a cycle). W is the left
// operand, whose tiles are rows as they lie in memory: no packing, as everywhere (bf16_linear.h). x is the
// right one, rounded to bf16 and laid out once per call as [step of 32 inputs][tile][pair of inputs][row of
// x]. A block of 16 rows of W meets up to four tiles of x at once, the others while it is in L2. The
// hardware's own prefetching sees through its 16 rows: prefetching the next block as well cost a tenth at M =
// 1, into L1 a quarter.
//
// A sum adds its pairs in their order, whatever the other rows are: a row's result does not depend on them.
// Denormals count as zero.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "amx.h"
#include "bf16_linear_op.h"
#include "parallel.h"
#include "transpose16.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

constexpr int kStep = 32;                 // inputs of a tile
constexpr int kTilesAtOnce = 4;           // of x: as many sums as there are registers for
constexpr int64_t kPanelBytes = 1 << 20;  // of x in a pass: half of L2
constexpr int64_t kFilledSteps = 8;       // of a tile of x, by one thread

// x of a pass: `tiles` tiles of `width` rows; missing rows and inputs are zero.
struct Panel {
  uint32_t* pairs;
  int64_t steps;
  int tiles, width;

  int64_t tile_words() const { return int64_t{kTileRows} * width; }
  int64_t first_row(int t) const { return int64_t{t} * width; }
  int rows(int t, int64_t m) const { return static_cast<int>(std::min<int64_t>(m - first_row(t), width)); }
  uint32_t* tile(int64_t step, int t) const { return pairs + (step * tiles + t) * tile_words(); }
};

// 32 inputs as 16 pairs of bf16; `count` of them exist.
template <class X>
SGLANG_ER_INLINE __m512i load_pairs(const X* x, int64_t count) {
  if (count >= kStep) {
    if constexpr (std::is_same_v<X, BFloat16>) return _mm512_loadu_si512(x);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load(x + kLanes).v, load(x).v));
  }
  const int first = static_cast<int>(count < kLanes ? count : kLanes);
  const Floats low = load_first(x, first);
  const Floats high = load_first(x + first, static_cast<int>(count) - first);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
}

// Steps [begin, end) of tile t.
template <class X>
void fill_tile(const Bf16LinearCall& call, const Panel& panel, int t, int64_t begin, int64_t end) {
  const int rows = panel.rows(t, call.m);
  const X* x = static_cast<const X*>(call.x) + panel.first_row(t) * call.x_stride + begin * kStep;
  const __mmask16 width = static_cast<__mmask16>((1u << panel.width) - 1);
  for (int64_t step = begin; step < end; ++step, x += kStep) {
    const int64_t left = call.k - step * kStep;
    uint32_t* out = panel.tile(step, t);
    if (panel.width == 1) {
      _mm512_storeu_si512(out, load_pairs(x, left));
      continue;
    }
    __m512i pairs[16];
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row)
      pairs[row] = row < rows ? load_pairs(x + row * call.x_stride, left) : _mm512_setzero_si512();
    transpose16(pairs);
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; ++pair)
      _mm512_mask_storeu_epi32(out + pair * panel.width, width, pairs[pair]);
  }
}

// Rows [first, first + rows) of W, at most 16.
struct Block {
  int64_t first;
  int rows;
};

template <class Out, class Bias>
void store_rows(const Bf16LinearCall& call, const float (&sums)[kTileRows][kLanes], Block block,
                int64_t first, int rows) {
  __m512i columns[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) columns[i] = _mm512_load_si512(sums[i]);
  transpose16(columns);
  const Bias* bias = call.bias == nullptr ? nullptr : static_cast<const Bias*>(call.bias) + block.first;
  Out* out = static_cast<Out*>(call.out) + first * call.out_stride + block.first;
  const Floats added = bias == nullptr ? zero() : load_first(bias, block.rows);
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) {
    if (row >= rows) return;
    Floats values{_mm512_castsi512_ps(columns[row])};
    if (bias != nullptr) values = add(values, added);
    if (block.rows == kTileRows) {
      store(out + row * call.out_stride, values);
    } else {
      float lanes[kLanes];
      store(lanes, values);
      for (int n = 0; n < block.rows; ++n) store_float(out + row * call.out_stride + n, lanes[n]);
    }
  }
}

// Tiles [first, first + T) of x. Registers 0 to 3: their sums. 4: W. 5 to 7: x.
template <int T>
SGLANG_ER_INLINE void add_step(const void* weight, int64_t row_bytes, const Panel& panel, int64_t step,
                               int first) {
  const uint32_t* x = panel.tile(step, first);
  const int64_t words = panel.tile_words(), x_bytes = panel.width * 4;
  _tile_loadd(4, weight, row_bytes);
  _tile_loadd(5, x, x_bytes);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (T > 1) {
    _tile_loadd(6, x + words, x_bytes);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (T > 2) {
    _tile_loadd(7, x + 2 * words, x_bytes);
    _tile_dpbf16ps(2, 4, 7);
  }
  if constexpr (T > 3) {
    _tile_loadd(5, x + 3 * words, x_bytes);
    _tile_dpbf16ps(3, 4, 5);
  }
}

// A block of W times tiles [first, first + T) of x.
template <int T>
void compute_block(const Bf16LinearCall& call, const Panel& panel, Block block, int first) {
  const int64_t stride = call.weight_stride;
  const BFloat16* weight = static_cast<const BFloat16*>(call.weight) + block.first * stride;
  _tile_zero(0);
  if constexpr (T > 1) _tile_zero(1);
  if constexpr (T > 2) _tile_zero(2);
  if constexpr (T > 3) _tile_zero(3);
  const int64_t full = call.k / kStep;
  for (int64_t step = 0; step < full; ++step) {
    const BFloat16* here = weight + step * kStep;
    if constexpr (T > 1) {  // by then so much is under way that W's own loads begin late
      for (int row = 0; row < kTileRows; ++row) __builtin_prefetch(here + row * stride + 2 * kStep);
    }
    add_step<T>(here, stride * 2, panel, step, first);
  }
  if (full < panel.steps) {
    alignas(64) BFloat16 padded[kTileRows * kStep] = {};
    for (int row = 0; row < block.rows; ++row)
      std::memcpy(padded + row * kStep, weight + row * stride + full * kStep,
                  static_cast<size_t>(call.k - full * kStep) * sizeof(BFloat16));
    add_step<T>(padded, kTileRowBytes, panel, full, first);
  }
  alignas(64) float sums[T][kTileRows][kLanes];
  _tile_stored(0, sums[0], kTileRowBytes);
  if constexpr (T > 1) _tile_stored(1, sums[1], kTileRowBytes);
  if constexpr (T > 2) _tile_stored(2, sums[2], kTileRowBytes);
  if constexpr (T > 3) _tile_stored(3, sums[3], kTileRowBytes);
  with_type(call.out_type, [&](auto* out) {
    with_type(call.bias_type, [&](auto* bias) {
      for (int t = 0; t < T; ++t)
        store_rows<std::remove_pointer_t<decltype(out)>, std::remove_pointer_t<decltype(bias)>>(
            call, sums[t], block, panel.first_row(first + t), panel.rows(first + t, call.m));
    });
  });
}

void compute_block(const Bf16LinearCall& call, const Panel& panel, Block block, int first, int tiles) {
  switch (tiles) {
    case 1:
      return compute_block<1>(call, panel, block, first);
    case 2:
      return compute_block<2>(call, panel, block, first);
    case 3:
      return compute_block<3>(call, panel, block, first);
    default:
      return compute_block<4>(call, panel, block, first);
  }
}

// Rows [first, end) of W, a unit of blocks, times all of x. After its first tiles of x a block is read from
// L2.
void compute_stripe(const Bf16LinearCall& call, const Panel& panel, int64_t first, int64_t end) {
  while (first < end) {
    const int rows = static_cast<int>(std::min<int64_t>(end - first, kTileRows));
    const Tiles::Shape sums{rows, panel.width * 4}, w{rows, kTileRowBytes}, x{kTileRows, panel.width * 4};
    const Tiles tiles({sums, sums, sums, sums, w, x, x, x});
    do {
      for (int t = 0; t < panel.tiles; t += kTilesAtOnce)
        compute_block(call, panel, Block{first, rows}, t, std::min(panel.tiles - t, kTilesAtOnce));
      first += rows;
    } while (end - first >= rows);
  }
}

void run_pass(const Bf16LinearCall& call) {
  Panel panel{};
  panel.steps = (call.k + kStep - 1) / kStep;
  panel.tiles = static_cast<int>((call.m + kTileRows - 1) / kTileRows);
  panel.width = static_cast<int>((call.m + panel.tiles - 1) / panel.tiles);
  const int64_t x_bytes = panel.steps * panel.tiles * panel.tile_words() * 4;
  panel.pairs = static_cast<uint32_t*>(scratch(static_cast<size_t>(x_bytes)));
  const int64_t parts = (panel.steps + kFilledSteps - 1) / kFilledSteps;
  parallel_for(parts * panel.tiles, threads_for(call.threads, x_bytes), [&](int64_t unit) {
    const int t = static_cast<int>(unit / parts);
    const int64_t begin = unit % parts * kFilledSteps, end = std::min(begin + kFilledSteps, panel.steps);
    with_type(call.x_type,
              [&](auto* x) { fill_tile<std::remove_pointer_t<decltype(x)>>(call, panel, t, begin, end); });
  });
  const int threads = threads_for(call.threads, call.n * call.k * 2);
  const int64_t blocks = (call.n + kTileRows - 1) / kTileRows;
  const int64_t height = kTileRows * blocks_per_unit(blocks, threads);
  parallel_for((call.n + height - 1) / height, threads, [&](int64_t unit) {
    const int64_t first = unit * height;
    compute_stripe(call, panel, first, std::min(first + height, call.n));
  });
}

}  // namespace

void bf16_linear_amx(const Bf16LinearCall& call) {
  if (call.weight_type != DType::kBFloat16) return bf16_linear_avx512(call);
  const int64_t fit = kPanelBytes / (2 * (call.k + kStep));
  in_passes(call, std::max<int64_t>(fit, kTilesAtOnce * kTileRows), run_pass);
}

}  // namespace sglang_er::cpu
