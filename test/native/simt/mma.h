// The instructions of csrc/include/sglang_er/mma.h for threads.h, in the layouts that the PTX documentation
// gives.
#pragma once

#include "simt/cuda_fp16.h"
#include "simt/cuda_runtime.h"

namespace sglang_er::mma {

template <class C>
struct Product {
  C (*c)[4];
  const FragmentA* a;
  const FragmentB* b;
};

// C += A * B of a warp, `Depth` inner elements, element(register, i) the i-th of a register.
template <int Depth, class C, class Sum, class Element>
void multiply_lanes(const std::array<Product<C>*, kLanes>& lanes, const Element& element) {
  constexpr int kOfRegister = Depth / 8;
  Sum left[kRows][Depth], right[Depth][kCols];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, first = lane % 4 * kOfRegister;
    for (int i = 0; i < kOfRegister; ++i) {
      for (int reg = 0; reg < 4; ++reg)
        left[row + reg % 2 * 8][first + i + reg / 2 * (Depth / 2)] = element(lanes[lane]->a->reg[reg], i);
      for (int reg = 0; reg < 2; ++reg)
        right[first + i + reg * (Depth / 2)][row] = element(lanes[lane]->b->reg[reg], i);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      Sum sum = (*lanes[lane]->c)[reg];
      for (int k = 0; k < Depth; ++k)
        sum += left[lane / 4 + reg / 2 * 8][k] * right[k][lane % 4 * 2 + reg % 2];
      (*lanes[lane]->c)[reg] = static_cast<C>(sum);
    }
  }
}

template <bool IsHalf>
void multiply_add(float (&c)[4], const FragmentA& a, const FragmentB& b) {
  Product<float> own{&c, &a, &b};
  simt::Block::now().together(own, [](const auto& lanes) {
    multiply_lanes<16, float, double>(lanes, [](uint32_t word, int i) {
      const auto bits = static_cast<uint16_t>(word >> 16 * i);
      return static_cast<double>(IsHalf ? __half2float(__ushort_as_half(bits))
                                        : std::bit_cast<float>(uint32_t{bits} << 16));
    });
  });
}

inline void multiply_add_int8(int (&c)[4], const FragmentA& a, const FragmentB& b) {
  Product<int> own{&c, &a, &b};
  simt::Block::now().together(own, [](const auto& lanes) {
    multiply_lanes<32, int, int>(
        lanes, [](uint32_t word, int i) { return int{static_cast<int8_t>(word >> 8 * i)}; });
  });
}

inline void multiply_int8(int (&c)[4], const FragmentA& a, const FragmentB& b, int start) {
  for (int& sum : c) sum = start;
  multiply_add_int8(c, a, b);
}

// ldmatrix.x4: lane l names row l % 8 of matrix l / 8.
inline void load_matrices(uint32_t (&reg)[4], const void* row) {
  CHECK(reinterpret_cast<uintptr_t>(row) % 16 == 0);
  struct Operands {
    uint32_t (*reg)[4];
    const void* row;
  } own{&reg, row};
  simt::Block::now().together(own, [](const auto& lanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i)
        std::memcpy(&(*lanes[lane]->reg)[i],
                    static_cast<const char*>(lanes[i * 8 + lane / 4]->row) + lane % 4 * 4, 4);
    }
  });
}

}  // namespace sglang_er::mma
