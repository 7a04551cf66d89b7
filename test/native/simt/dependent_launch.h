// The instructions of csrc/cuda/dependent_launch.h for threads.h.
#pragma once

#include "simt/cuda_runtime.h"

namespace sglang_er::cuda {

inline void wait_for_previous() {
  if (simt::Block::previous_is_over()) return;
  simt::Block::previous()();
  simt::Block::previous_is_over() = true;
}
inline void let_next_start() {}

}  // namespace sglang_er::cuda
