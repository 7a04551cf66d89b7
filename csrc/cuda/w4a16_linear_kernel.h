// The kernel of w4a16_linear.cu, which says who computes what.
#pragma once

#include "w4_linear_block.h"
#include "w4a16_linear_tile.h"

namespace sglang_er::cuda {

template <bool IsHalf, int ColTiles>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor<ColTiles>)
    w4a16_linear_kernel(const __grid_constant__ W4A16LinearParams params) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<W4A16Shared<ColTiles>*>(memory);
  W4A16Tile<IsHalf, ColTiles> tile(params, shared);
  compute_block<IsHalf, ColTiles>(tile, shared);
}

}  // namespace sglang_er::cuda
