// The instructions of csrc/cuda/dequant_attention_ptx.h for threads.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "simt/cuda_runtime.h"

namespace sglang_er::cuda {

// movmatrix.m8n8.trans.b16
inline uint32_t transpose(uint32_t pair) {
  struct Operands {
    uint32_t given, taken;
  } own{pair, 0};
  simt::Block::now().together(own, [](const auto& lanes) {
    const auto element = [&](int row, int col) {
      return lanes[row * 4 + col / 2]->given >> (16 * (col % 2)) & 0xFFFFu;
    };
    for (int lane = 0; lane < simt::kWarpThreads; ++lane)
      lanes[lane]->taken = element(lane % 4 * 2, lane / 4) | element(lane % 4 * 2 + 1, lane / 4) << 16;
  });
  return own.taken;
}

inline float exp2_fast(float x) {
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0.0f : power;
}

template <int Words>
void load_pool(const uint16_t* values, int64_t stride, int slot, int dim, uint32_t (&words)[Words]) {
  for (uint32_t& word : words) word = 0;
  if (slot < 0) return;
  const uint16_t* from = values + slot * stride + dim;
  CHECK(reinterpret_cast<uintptr_t>(from) % (4 * Words) == 0);
  std::memcpy(words, from, sizeof(words));
}

}  // namespace sglang_er::cuda
