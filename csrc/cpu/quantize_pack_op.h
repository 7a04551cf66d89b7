// The call of quantize_pack, as the bindings hand it to the kernel of the active instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "sglang_er/packed_weight.h"

namespace sglang_er::cpu {

struct QuantizePackCall {
  const void* weight;  // [N, K], rows weight_stride elements apart
  int64_t weight_stride;
  DType weight_type;
  uint8_t* packed;         // packed_weight.h
  uint16_t* scales_zeros;  // packed_weight.h
  PackedShape shape;
  bool clip_search;  // clip_search.h
  int threads;
};

void quantize_pack(const QuantizePackCall& call);  // the active instruction set

void quantize_pack_portable(const QuantizePackCall& call);
void quantize_pack_avx2(const QuantizePackCall& call);
void quantize_pack_avx512(const QuantizePackCall& call);

}  // namespace sglang_er::cpu
