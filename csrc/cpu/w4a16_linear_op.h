// w4a16_linear, as the bindings call it, and its kernel for each instruction set.
#pragma once

#include "w4_linear_op.h"

namespace sglang_er::cpu {

using W4A16Call = W4LinearCall;

void w4a16_linear(const W4A16Call& call);  // the active instruction set

void w4a16_linear_portable(const W4A16Call& call);
void w4a16_linear_avx2(const W4A16Call& call);
void w4a16_linear_avx512(const W4A16Call& call);
void w4a16_linear_avx512_bf16(const W4A16Call& call);  // bf16 x only

}  // namespace sglang_er::cpu
