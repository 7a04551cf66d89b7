// A warp without a GPU: its matrix product and its shuffles, on what all 32 lanes hold, in the layouts that
// the PTX documentation gives.
#pragma once

#include <array>
#include <cstdint>

#include "sglang_er/bfloat16.h"
#include "sglang_er/mma.h"

namespace sglang_er::cpu::warp {

template <class T>
using Lanes = std::array<T, 32>;
using SumC = Lanes<std::array<float, 4>>;
using OperandsA = Lanes<mma::FragmentA>;
using OperandsB = Lanes<std::array<uint32_t, 2>>;

inline double half(uint32_t word, int i) { return bf16_to_float(static_cast<uint16_t>(word >> (16 * i))); }

// mma.sync.m16n8k16.f32.bf16.bf16.f32
inline void multiply_add(SumC& sum, const OperandsA& a, const OperandsB& b) {
  double left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      for (int i = 0; i < 2; ++i)
        left[lane / 4 + reg % 2 * 8][lane % 4 * 2 + i + reg / 2 * 8] = half(a[lane].reg[reg], i);
    }
    for (int reg = 0; reg < 2; ++reg) {
      for (int i = 0; i < 2; ++i) right[lane % 4 * 2 + i + reg * 8][lane / 4] = half(b[lane][reg], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int c = 0; c < 4; ++c) {
      double total = sum[lane][c];
      for (int k = 0; k < 16; ++k) total += left[lane / 4 + c / 2 * 8][k] * right[k][lane % 4 * 2 + c % 2];
      sum[lane][c] = static_cast<float>(total);
    }
  }
}

// movmatrix.m8n8.trans.b16
inline Lanes<uint32_t> transpose(const Lanes<uint32_t>& pairs) {
  const auto element = [&](int row, int col) {
    return pairs[row * 4 + col / 2] >> (16 * (col % 2)) & 0xFFFF;
  };
  Lanes<uint32_t> out;
  for (int lane = 0; lane < 32; ++lane)
    out[lane] = element(lane % 4 * 2, lane / 4) | element(lane % 4 * 2 + 1, lane / 4) << 16;
  return out;
}

// combine(own, lane ^ distance) for the distances first, 2 * first, ... below 32.
template <class T, class Fn>
Lanes<T> reduce(Lanes<T> values, int first, const Fn& combine) {
  for (int distance = first; distance < 32; distance *= 2) {
    const Lanes<T> before = values;
    for (int lane = 0; lane < 32; ++lane) values[lane] = combine(before[lane], before[lane ^ distance]);
  }
  return values;
}

// 16-byte units or single words that lanes read at once touch every bank of shared memory at most once.
inline bool conflict_free(const Lanes<int>& offsets, int bytes) {
  const int at_once = 128 / bytes;
  for (int first = 0; first < 32; first += at_once) {
    uint32_t banks = 0;
    for (int lane = first; lane < first + at_once; ++lane) {
      for (int word = 0; word < bytes / 4; ++word) {
        const uint32_t bank = 1u << ((offsets[lane] / 4 + word) % 32);
        if ((banks & bank) != 0) return false;
        banks |= bank;
      }
    }
  }
  return true;
}

}  // namespace sglang_er::cpu::warp
