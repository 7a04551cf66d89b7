// The instructions of csrc/cuda/async_copy.h for threads.h.
#pragma once

#include <cstdint>

#include "simt/cuda_runtime.h"

namespace sglang_er::cuda {

inline void copy_16(void* shared, const void* global, int bytes = 16) {
  const auto unaligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 != 0; };
  CHECK(!unaligned(shared) && !unaligned(global));
  simt::Block::now().begin_copy({shared, global, bytes, 16});
}
inline void close_copies() { simt::Block::now().close_copies(); }
template <int Open>
void wait_copies() {
  static_assert(Open >= 0);
  simt::Block::now().land(Open);
}

}  // namespace sglang_er::cuda
