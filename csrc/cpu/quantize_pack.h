// packed, scales_zeros = asymmetric round-to-nearest int4 of W[N, K] (rule: quantize.h, layout:
// packed_weight.h).
//
// Bound: bytes. A weight is read once (2 or 4 bytes) and written once (4.25 bits at group 128).
// Who computes what: a thread takes one block of 16 rows and goes through its groups, so it writes its part
// of both buffers front to back. Within a group each row is loaded, its minimum and maximum give scale and
// zero, and its levels are joined into G/8 words for its lane, while the row's group sits in L1.
//
// This is the form for any group size and any edge; quantize_pack_avx512.cpp and quantize_pack_avx2.cpp have
// a faster one for whole groups of whole blocks. Included by one translation unit per instruction set;
// everything is local to it (anonymous namespace).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "parallel.h"
#include "quantize_pack_op.h"
#include "sglang_er/clip_search.h"
#include "sglang_er/quantize.h"

namespace sglang_er::cpu {
namespace {

// The code of a group that loses least.
inline GroupCode clipped(const float* values, int valid, float low, float high, const GroupCode& whole) {
  clip::Search search = clip::begin(low, high, whole);
  int units[kMaxGroupSize];
  for (int k = 0; k < valid; ++k) units[k] = clip::units(values[k], whole);
  for (int i = 0; i < clip::kCandidates; ++i) {
    const clip::Candidate candidate = clip::candidate(search, i);
    uint32_t squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int k = 0; k < valid; ++k) squares += clip::square(clip::error(units[k], candidate));
    clip::compare(search, i, candidate, squares);
  }
  return search.best;
}

// Quantizes `valid` weights of one row's group (at least one) and writes the words of its lane.
template <class T>
GroupCode pack_row_group(const T* weights, int valid, int group_size, bool clip_search, uint8_t* lane_words) {
  float values[kMaxGroupSize + 64];  // not 4096 bytes: same offsets in both arrays would stall the loads
  values[0] = 0.0f;                  // GCC does not see that valid > 0
  uint32_t levels[kMaxGroupSize];
  for (int k = 0; k < valid; ++k) values[k] = to_float(weights[k]);
  float low = values[0], high = values[0];
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int k = 1; k < valid; ++k) {
    low = values[k] < low ? values[k] : low;
    high = values[k] > high ? values[k] : high;
  }
  GroupCode code = group_code(low, high);
  if (clip_search) code = clipped(values, valid, low, high, code);

  for (int k = 0; k < valid; ++k) levels[k] = static_cast<uint32_t>(quantize_value(values[k], code));
  for (int k = valid; k < group_size; ++k) levels[k] = 0;
  // Position by position, so that neighbouring words take neighbouring levels (nibble_input).
  const int words = group_size / kWeightsPerWord;
  uint32_t packed[kMaxGroupSize / kWeightsPerWord] = {};
  for (int position = 0; position < 4; ++position) {
    const uint32_t* run = levels + nibble_input(group_size, 0, 0, position);
    for (int word = 0; word < words; ++word) {
      packed[word] |= (run[2 * word] | run[2 * word + 1] << nibble_shift(1, 0)) << nibble_shift(0, position);
    }
  }
  for (int word = 0; word < words; ++word) {
    std::memcpy(lane_words + word * kWordBytes, &packed[word], sizeof(packed[word]));
  }
  return code;
}

// One group of one block of 16 rows, of which the first `rows` exist.
template <class T>
void pack_block_group(const QuantizePackCall& call, int64_t block, int64_t group, int rows) {
  const PackedShape& shape = call.shape;
  const int64_t begin = group * shape.group_size;
  const int64_t left = shape.cols - begin;
  const int valid = left < shape.group_size ? static_cast<int>(left) : shape.group_size;
  const T* weights = static_cast<const T*>(call.weight) + block * kRowBlock * call.weight_stride + begin;
  uint8_t* words = call.packed + block * shape.block_bytes() + group * shape.group_bytes();
  uint16_t* meta = call.scales_zeros + block * shape.block_meta() + group * 2 * kRowBlock;
  for (int lane = 0; lane < kRowBlock; ++lane) {
    GroupCode code{};
    if (lane < rows) {
      code = pack_row_group(weights + lane * call.weight_stride, valid, shape.group_size, call.clip_search,
                            words + lane * 4);
    } else {
      for (int word = 0; word < shape.words(); ++word)
        std::memset(words + word * kWordBytes + lane * 4, 0, 4);
    }
    meta[lane] = code.scale_bits;
    meta[kRowBlock + lane] = code.zero_bits;
  }
}

SGLANG_ER_INLINE int rows_in_block(const PackedShape& shape, int64_t block) {
  const int64_t left = shape.rows - block * kRowBlock;
  return left < kRowBlock ? static_cast<int>(left) : kRowBlock;
}

// Runs pack_block(type, block) for every block on the call's threads.
template <class PackBlock>
void for_each_block(const QuantizePackCall& call, const PackBlock& pack_block) {
  const int64_t bytes = call.shape.rows * call.shape.cols * element_bytes(call.weight_type);
  const int threads = threads_for(call.threads, bytes);
  with_type(call.weight_type, [&](auto* type) {
    parallel_for(call.shape.row_blocks(), threads, [&](int64_t block) { pack_block(type, block); });
  });
}

template <class T>
void pack_block_any(const QuantizePackCall& call, int64_t block) {
  const int rows = rows_in_block(call.shape, block);
  for (int64_t group = 0; group < call.shape.groups(); ++group) pack_block_group<T>(call, block, group, rows);
}

[[maybe_unused]] void run_quantize_pack_any(const QuantizePackCall& call) {
  for_each_block(call, [&](auto* type, int64_t block) {
    pack_block_any<std::remove_pointer_t<decltype(type)>>(call, block);
  });
}

// The fast forms take groups of this many weights: a group size in common use.
constexpr int kGroup = 128;

// A block of 16 rows: its whole groups by Fast::pack_group, a rest of columns, and a group that it refuses,
// by the general form.
template <class Fast, class T>
void pack_full_block(const QuantizePackCall& call, int64_t block) {
  const PackedShape& shape = call.shape;
  const int64_t full_groups = shape.cols / kGroup;
  const T* weights = static_cast<const T*>(call.weight) + block * kRowBlock * call.weight_stride;
  const T* ahead = weights + kRowBlock * call.weight_stride;  // the next block, in the order of its memory
  uint8_t* packed = call.packed + block * shape.block_bytes();
  uint16_t* meta = call.scales_zeros + block * shape.block_meta();
  for (int64_t group = 0; group < full_groups; ++group) {
    if (!Fast::pack_group(weights, call.weight_stride, packed, meta, ahead)) {
      pack_block_group<T>(call, block, group, kRowBlock);
    }
    weights += kGroup;
    ahead += kRowBlock * kGroup;
    packed += shape.group_bytes();
    meta += 2 * kRowBlock;
  }
  Fast::publish();  // streamed words are seen by other threads before this one reports that it is done
  if (full_groups < shape.groups()) pack_block_group<T>(call, block, full_groups, kRowBlock);
}

// `Fast` packs whole groups in blocks of 16 rows; everything else takes the general form.
template <class Fast>
void run_quantize_pack_fast(const QuantizePackCall& call) {
  for_each_block(call, [&](auto* type, int64_t block) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (call.shape.group_size == kGroup && rows_in_block(call.shape, block) == kRowBlock) {
      pack_full_block<Fast, T>(call, block);
    } else {
      pack_block_any<T>(call, block);
    }
  });
}

}  // namespace
}  // namespace sglang_er::cpu
