// One index per row from non-negative weights and a coin: the first i with w_0 + ... + w_i > coin * sum(w).
//
// Bound: reading the weights once. Every block of 512 is summed in fp64 (the threads share rows and blocks),
// the block that the coin falls into is found among the sums, and only that block is walked element by
// element. The residual max(p - q, 0) is formed in fp64 in registers and never stored.
//
// Block and element sums are added in a fixed order, whatever the threads and the instruction set are. Within
// the block the order differs from that of its sum, so a coin at the block's very end may find no element:
// the block's last weight takes it. An index without weight is never drawn.
//
// Included by one translation unit per instruction set; everything is local to it (anonymous namespace).
#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "sampling_op.h"

namespace sglang_er::cpu {
namespace {

constexpr int64_t kSumBlock = 512;
constexpr int64_t kBlocksPerUnit = 32;

// As many doubles as a register holds, and as many floats. A block is summed in 32 lanes, in however many
// registers they are, so the order of additions is the same everywhere.
#if defined(__AVX512F__)
constexpr int kWidth = 8;
#elif defined(__AVX__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
constexpr int kSumLanes = 32;
constexpr int kRegisters = kSumLanes / kWidth;
using FloatLanes [[gnu::vector_size(4 * kWidth)]] = float;
using DoubleLanes [[gnu::vector_size(8 * kWidth)]] = double;

// What a row draws from: p, or max(p - q, 0) if q is not null.
struct RowWeights {
  const float* p;
  const float* q;

  double at(int64_t i) const {
    if (q == nullptr) return p[i];
    const double residual = static_cast<double>(p[i]) - static_cast<double>(q[i]);
    return residual > 0.0 ? residual : 0.0;
  }
};

SGLANG_ER_INLINE DoubleLanes widen(const float* values) {
  FloatLanes lanes;
  std::memcpy(&lanes, values, sizeof(lanes));
  return __builtin_convertvector(lanes, DoubleLanes);
}

template <bool kResidual>
double block_sum(const RowWeights& weights, int64_t begin, int64_t end) {
  DoubleLanes sums[kRegisters] = {};
  int64_t i = begin;
  for (; i + kSumLanes <= end; i += kSumLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kRegisters; ++r) {
      DoubleLanes values = widen(weights.p + i + kWidth * r);
      if constexpr (kResidual) {
        values -= widen(weights.q + i + kWidth * r);
        values = values > 0.0 ? values : DoubleLanes{};
      }
      sums[r] += values;
    }
  }
  double lanes[kSumLanes];
  std::memcpy(lanes, sums, sizeof(lanes));
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  double sum = lanes[0];
  for (; i < end; ++i) sum += weights.at(i);
  return sum;
}

void sum_blocks(const RowWeights& weights, int64_t size, int64_t first, int64_t last, double* sums) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kSumBlock;
    const int64_t end = begin + kSumBlock < size ? begin + kSumBlock : size;
    sums[block] =
        weights.q == nullptr ? block_sum<false>(weights, begin, end) : block_sum<true>(weights, begin, end);
  }
}

double total_of(const double* sums, int64_t blocks) {
  double total = 0.0;
  for (int64_t block = 0; block < blocks; ++block) total += sums[block];
  return total;
}

// The element of [begin, end) at which `sum` grows past the threshold, or the last one that has a weight.
int64_t walk(const RowWeights& weights, int64_t begin, int64_t end, double sum, double threshold) {
  int64_t last = begin;
  for (int64_t i = begin; i < end; ++i) {
    const double weight = weights.at(i);
    if (!(weight > 0.0)) continue;
    last = i;
    sum += weight;
    if (sum > threshold) break;
  }
  return last;
}

int64_t draw(const RowWeights& weights, int64_t size, const double* sums, int64_t blocks, double total,
             double coin) {
  const double threshold = coin * total;
  double sum = 0.0;
  int64_t chosen = 0;
  double before = 0.0;  // of the chosen block; the last one with a weight if coin * total rounds up to total
  for (int64_t block = 0; block < blocks; ++block) {
    if (!(sums[block] > 0.0)) continue;
    chosen = block;
    before = sum;
    sum += sums[block];
    if (sum > threshold) break;
  }
  const int64_t begin = chosen * kSumBlock;
  return walk(weights, begin, begin + kSumBlock < size ? begin + kSumBlock : size, before, threshold);
}

void run_sample_rows(const SampleRowsCall& call) {
  const int64_t blocks = (call.size + kSumBlock - 1) / kSumBlock;
  const int64_t units = (blocks + kBlocksPerUnit - 1) / kBlocksPerUnit;
  auto* sums = static_cast<double*>(scratch(static_cast<size_t>(call.rows * blocks) * sizeof(double)));
  const auto weights_of = [&](int64_t row) {
    const int64_t offset = call.offsets == nullptr ? 0 : call.offsets[row];
    return RowWeights{call.weights.at(row, offset),
                      offset < call.subtract.width ? call.subtract.at(row, offset) : nullptr};
  };
  const int64_t bytes = call.rows * call.size * static_cast<int64_t>(sizeof(float));
  parallel_for(call.rows * units, threads_for(call.threads, bytes), [&](int64_t unit) {
    const int64_t row = unit / units;
    const int64_t first = unit % units * kBlocksPerUnit;
    const int64_t last = first + kBlocksPerUnit < blocks ? first + kBlocksPerUnit : blocks;
    sum_blocks(weights_of(row), call.size, first, last, sums + row * blocks);
  });
  for (int64_t row = 0; row < call.rows; ++row) {
    RowWeights weights = weights_of(row);
    double* row_sums = sums + row * blocks;
    double total = total_of(row_sums, blocks);
    if (weights.q != nullptr && !(total > 0.0)) {  // p == q up to rounding: p itself is the limit
      weights.q = nullptr;
      sum_blocks(weights, call.size, 0, blocks, row_sums);
      total = total_of(row_sums, blocks);
    }
    call.out[row] = draw(weights, call.size, row_sums, blocks, total, call.coins[row]);
  }
}

}  // namespace
}  // namespace sglang_er::cpu
