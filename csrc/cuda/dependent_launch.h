// Programmatic dependent launch (sm_90 on): a launch whose blocks may start while the one before it in the
// stream still runs, and which waits by itself before it touches what that one reads or writes.
//
// Only within a CUDA graph's capture. What such a kernel reads before it waits, packed weights, must not be
// written by anything in the same graph, as launches before the last one may not be complete either: a graph
// that packs a weight and multiplies by it would read half of it. A graph as a whole starts after what was
// launched before it. All threads wait, so that whatever follows the kernel also follows what
// came before it.
#pragma once

#if defined(SGLANG_ER_SIMT)
#include "simt/dependent_launch.h"  // for threads of a CPU: test/native
#else

namespace sglang_er::cuda {

// Until the launches before this one are complete and what they wrote is seen; at once in an ordinary launch.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next launch may start, if it was made so.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace sglang_er::cuda

#endif
