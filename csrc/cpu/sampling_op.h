// The calls of sample_rows and softmax_rows, as the bindings hand them to the kernels of the active
// instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace sglang_er::cpu {

// fp32 [rows, width, size] with contiguous last dimension; any strides (elements) in the others.
struct Weights {
  const float* data;
  int64_t row_stride;
  int64_t width;
  int64_t width_stride;

  SGLANG_ER_INLINE const float* at(int64_t row, int64_t offset) const {
    return data + row * row_stride + offset * width_stride;
  }
};

// Row r draws one index from weights[r, offset] or, where offset < subtract.width, from
// max(weights[r, offset] - subtract[r, offset], 0); offset = offsets[r].
struct SampleRowsCall {
  Weights weights;
  Weights subtract;        // width 0: none
  const int64_t* offsets;  // [rows] in [0, weights.width), or null for zeros
  const double* coins;     // [rows] in [0, 1)
  int64_t rows;
  int64_t size;
  int64_t* out;  // [rows]
  int threads;
};

struct SoftmaxRowsCall {
  const void* logits;  // [rows, size], rows stride elements apart
  int64_t stride;
  DType type;
  const float* temperatures;  // [rows]
  int64_t rows;
  int64_t size;
  float* out;  // [rows, size], rows out_stride elements apart
  int64_t out_stride;
  int threads;
};

// On the active instruction set.
void sample_rows(const SampleRowsCall& call);
void softmax_rows(const SoftmaxRowsCall& call);

void sample_rows_portable(const SampleRowsCall& call);
void sample_rows_avx2(const SampleRowsCall& call);
void sample_rows_avx512(const SampleRowsCall& call);
void softmax_rows_portable(const SoftmaxRowsCall& call);
void softmax_rows_avx2(const SoftmaxRowsCall& call);
void softmax_rows_avx512(const SoftmaxRowsCall& call);

}  // namespace sglang_er::cpu
