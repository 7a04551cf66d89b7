// Qualifiers shared by host and device code.
//
// SGLANG_ER_INLINE marks a small function that is compiled into its caller and nowhere else. On the host this
// matters for more than speed: the same header is compiled once per instruction set, and an out-of-line copy
// made with AVX-512 flags could be the one that the linker keeps for a machine without AVX-512.
#pragma once

#if defined(__CUDACC__)
#define SGLANG_ER_INLINE __host__ __device__ __forceinline__
#else
#define SGLANG_ER_INLINE [[gnu::always_inline]] inline
#endif
