// Operations on words that compilers need help with.
#pragma once

#include <cstdint>

#include "sglang_er/macros.h"

namespace sglang_er {

// (word & mask) | bits. Named, because the compiler would take two instructions for the two constants.
SGLANG_ER_INLINE uint32_t mask_or(uint32_t word, uint32_t mask, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
#else
  return (word & mask) | bits;
#endif
}

}  // namespace sglang_er
