// Copies from device to shared memory that the thread does not wait for, one function an instruction.
#pragma once

#include <cstdint>

#if defined(SGLANG_ER_SIMT)
#include "simt/async_copy.h"  // for threads of a CPU: test/native
#else

namespace sglang_er::cuda {

// 16 bytes past the registers and L1, of which the first `bytes` are read and the others become zero. Both
// addresses are multiples of 16.
__device__ __forceinline__ void copy_16(void* shared, const void* global, int bytes = 16) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
}

// The copies since the last call become a group.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `Open` of this thread's groups, the newest ones, are under way.
template <int Open>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
}

}  // namespace sglang_er::cuda

#endif
