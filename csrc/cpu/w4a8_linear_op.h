// w4a8_linear, as the bindings and the decoder call it, and its kernel for each instruction set.
#pragma once

#include "w4_linear_op.h"

namespace sglang_er::cpu {

using W4A8Call = W4LinearCall;

void w4a8_linear(const W4A8Call& call);  // the active instruction set

void w4a8_linear_portable(const W4A8Call& call);
void w4a8_linear_avx2(const W4A8Call& call);
void w4a8_linear_avx512_vnni(const W4A8Call& call);
void w4a8_linear_amx(const W4A8Call& call);

}  // namespace sglang_er::cpu
