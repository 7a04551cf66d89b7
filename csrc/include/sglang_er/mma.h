// Warp matrix instructions: what lane holds which element, and on the device the instructions themselves, one
// function each.
#pragma once

#include <cstdint>

#include "sglang_er/macros.h"

namespace sglang_er::mma {

inline constexpr int kLanes = 32;
inline constexpr int kRows = 16;  // of A and C
inline constexpr int kCols = 8;   // of B and C

// Registers of m16n8k16; g = lane / 4, t = lane % 4. A and B hold two 16-bit neighbours along the inner
// dimension in a register, the first one in the low half; C holds fp32.
//
//   A, register r: row g + r % 2 * 8, inner 2 t + r / 2 * 8 and the next
//   B, register r: column g, inner 2 t + r * 8 and the next
//   C, register r: row g + r / 2 * 8, column 2 t + r % 2
//
// Of m16n8k32 with 8-bit integers: four neighbours in a register, the first one in the lowest byte, inner 4 t
// + r / 2 * 16 (A) and 4 t + r * 16 (B); C holds int32. Rows and columns are the same.
struct FragmentA {
  uint32_t reg[4];
};
struct FragmentB {
  uint32_t reg[2];
};

SGLANG_ER_INLINE int c_col(int lane, int reg) { return lane % 4 * 2 + reg % 2; }

// ldmatrix.x4 loads four 8 x 8 matrices: this lane gives the address of 16 bytes, row `address_row` of matrix
// `address_matrix`, and gets from matrix i, in register i, columns 2 t and 2 t + 1 of row g.
SGLANG_ER_INLINE int address_matrix(int lane) { return lane / 8; }
SGLANG_ER_INLINE int address_row(int lane) { return lane % 8; }

#if defined(__CUDACC__)

// c += A * B on the tensor cores, fp32 sums.
template <bool IsHalf>
__device__ __forceinline__ void multiply_add(float (&c)[4], const FragmentA& a, const FragmentB& b) {
  if constexpr (IsHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]));
  }
}

// c = A * B + start of signed 8-bit integers, exactly. Not by way of c: one set of registers has the start of
// all sums.
__device__ __forceinline__ void multiply_int8(int (&c)[4], const FragmentA& a, const FragmentB& b,
                                              int start) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]), "r"(start));
}

// c += A * B of signed 8-bit integers, exactly.
__device__ __forceinline__ void multiply_add_int8(int (&c)[4], const FragmentA& a, const FragmentB& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]));
}

// `row` is the lane's row of shared memory, 16-byte aligned.
__device__ __forceinline__ void load_matrices(uint32_t (&reg)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
               : "r"(address)
               : "memory");
}

#endif

}  // namespace sglang_er::mma

#if defined(SGLANG_ER_SIMT)
#include "simt/mma.h"  // the same for threads of a CPU: test/native
#endif
