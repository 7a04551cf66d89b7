// The kernels of w4a8_linear.cu, which says who computes what.
#pragma once

#include "w4_linear_block.h"
#include "w4a8_linear_tile.h"

namespace sglang_er::cuda {

inline constexpr int kQuantizeThreads = 256;

struct QuantizeRowsParams {
  const uint16_t* x;
  int64_t x_stride;
  int64_t cols;
  QuantizedRows to;
};

// A warp takes a row's group.
template <bool IsHalf>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams params) {
  let_next_start();
  wait_for_previous();
  constexpr int kWarps = kQuantizeThreads / mma::kLanes;
  const int lane = threadIdx.x % mma::kLanes;
  const int group = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / mma::kLanes);
  if (group >= params.to.groups) return;
  const int64_t row = blockIdx.y, item = row * params.to.groups + group;

  float values[w4a8::kLaneLevels];
  uint32_t top = 0;
#pragma unroll
  for (int c = 0; c < w4a8::kLaneLevels; ++c) {
    const int64_t input = int64_t{group} * w4::kGroup + w4a8::first_input(lane, c % 2) + c / 2;
    values[c] = input < params.cols ? w4::input_value<IsHalf>(params.x[row * params.x_stride + input]) : 0.0f;
    top = max(top, __float_as_uint(values[c]) & 0x7FFFFFFFu);
  }
  top = __reduce_max_sync(0xFFFFFFFFu, top);
  const bool finite = w4a8::is_finite(top);
  const w4a8::Quantizer quantizer = w4a8::quantizer(__uint_as_float(top));
  int levels[w4a8::kLaneLevels], sum = 0;
#pragma unroll
  for (int c = 0; c < w4a8::kLaneLevels; ++c) {
    levels[c] = finite ? w4a8::level(values[c], quantizer.inverse) : 0;
    sum += levels[c];
  }
  sum = __reduce_add_sync(0xFFFFFFFFu, sum);
  reinterpret_cast<uint32_t*>(params.to.levels + item * w4::kGroup)[lane] = w4a8::pack_levels(levels);
  if (lane == 0) {
    const float scale = finite ? quantizer.scale : __int_as_float(0x7FC00000);
    params.to.numbers[item] = {scale, __fmul_rn(scale, static_cast<float>(sum))};
  }
}

template <bool IsHalf, int ColTiles>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor<ColTiles>)
    w4a8_linear_kernel(const __grid_constant__ W4A8LinearParams params) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<W4A8Shared<ColTiles>*>(memory);
  W4A8Tile<ColTiles> tile(params);
  compute_block<IsHalf, ColTiles>(tile, shared);
}

}  // namespace sglang_er::cuda
