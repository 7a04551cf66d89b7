// out = softmax(logits / temperature) by rows, fp32.
//
// Bound: e^x, and memory once a row outgrows the cache. A block of 1024 goes through L1: divided, its largest
// value found, e^(x - largest) written and summed. The blocks are then brought to the row's largest value and
// sum by one factor each, while the row is still in L2. Threads share rows or, if rows are few, the blocks of
// a row; the arithmetic is the same.
//
// As in torch, -inf gives 0, and a row with a NaN, +inf, or nothing but -inf becomes NaN.
//
// Included by one translation unit per instruction set; everything is local to it (anonymous namespace).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "parallel.h"
#include "sampling_op.h"
#include "vec.h"

namespace sglang_er::cpu {
namespace {

constexpr int64_t kSoftmaxBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct BlockSum {
  float largest;
  float sum;  // of e^(x - largest); NaN if the block has a NaN or +inf
};

// The first `count` values in the low lanes, -inf in the others.
template <class T>
SGLANG_ER_INLINE Floats load_or_lowest(const T* values, int count) {
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? to_float(values[i]) : -kInfinity;
  return load(lanes);
}

template <class T>
BlockSum exponentiate(const T* logits, float temperature, int count, float* out) {
  const Floats divisor = broadcast(temperature);
  const int whole = count / kLanes * kLanes;
  alignas(64) float rest[kLanes];  // the last, partial vector
  Floats largest = broadcast(-kInfinity);
  for (int i = 0; i < whole; i += kLanes) {
    const Floats x = temperature == 1.0f ? load(logits + i) : div(load(logits + i), divisor);
    store(out + i, x);
    largest = max(largest, x);
  }
  if (whole < count) {
    const Floats x = div(load_or_lowest(logits + whole, count - whole), divisor);
    store(rest, x);
    store_first(out + whole, x, count - whole);
    largest = max(largest, x);
  }
  int wrong = 0;
  for (int i = 0; i < count; ++i) wrong |= !(out[i] <= std::numeric_limits<float>::max());
  if (wrong != 0) return {0.0f, std::numeric_limits<float>::quiet_NaN()};

  BlockSum block{reduce_max(largest), 0.0f};
  const Floats shift = broadcast(block.largest == -kInfinity ? 0.0f : block.largest);
  Floats sums = zero();
  for (int i = 0; i < whole; i += kLanes) {
    const Floats y = exp(sub(load(out + i), shift));
    store(out + i, y);
    sums = add(sums, y);
  }
  if (whole < count) {
    const Floats y = exp(sub(load(rest), shift));
    store_first(out + whole, y, count - whole);
    sums = add(sums, y);
  }
  block.sum = sum(sums);
  return block;
}

// Turns the blocks' sums into the factors that their values take.
void combine(BlockSum* blocks, int64_t count) {
  float largest = -kInfinity;
  for (int64_t i = 0; i < count; ++i) largest = blocks[i].largest > largest ? blocks[i].largest : largest;
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double share = largest == -kInfinity ? 0.0 : std::exp(double{blocks[i].largest} - largest);
    total += share * blocks[i].sum;
    blocks[i].largest = static_cast<float>(share);
  }
  for (int64_t i = 0; i < count; ++i) blocks[i].sum = static_cast<float>(double{blocks[i].largest} / total);
}

void multiply(float* values, float factor, int count) {
  const Floats factors = broadcast(factor);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, mul(load(values + i), factors));
  for (; i < count; ++i) values[i] *= factor;
}

template <class T>
void softmax_typed(const SoftmaxRowsCall& call) {
  const int64_t blocks = (call.size + kSoftmaxBlock - 1) / kSoftmaxBlock;
  const int threads = threads_for(call.threads, call.rows * call.size * int64_t{sizeof(float)});
  const bool by_rows = call.rows >= threads;
  auto* sums = static_cast<BlockSum*>(scratch(static_cast<size_t>(call.rows * blocks) * sizeof(BlockSum)));
  const auto length = [&](int64_t block) {
    const int64_t left = call.size - block * kSoftmaxBlock;
    return static_cast<int>(left < kSoftmaxBlock ? left : kSoftmaxBlock);
  };
  const auto row_of = [&](int64_t row, int inner_threads) {
    const T* logits = static_cast<const T*>(call.logits) + row * call.stride;
    float* out = call.out + row * call.out_stride;
    BlockSum* row_sums = sums + row * blocks;
    parallel_for(blocks, inner_threads, [&](int64_t block) {
      const int64_t begin = block * kSoftmaxBlock;
      row_sums[block] = exponentiate(logits + begin, call.temperatures[row], length(block), out + begin);
    });
    combine(row_sums, blocks);
    parallel_for(blocks, inner_threads, [&](int64_t block) {
      multiply(out + block * kSoftmaxBlock, row_sums[block].sum, length(block));
    });
  };
  if (by_rows) {
    parallel_for(call.rows, threads, [&](int64_t row) { row_of(row, 1); });
  } else {
    for (int64_t row = 0; row < call.rows; ++row) row_of(row, threads);
  }
}

void run_softmax_rows(const SoftmaxRowsCall& call) {
  with_type(call.type, [&](auto* type) { softmax_typed<std::remove_pointer_t<decltype(type)>>(call); });
}

}  // namespace
}  // namespace sglang_er::cpu
