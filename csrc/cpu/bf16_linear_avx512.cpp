// bf16_linear with fp32 FMA on AVX-512. No vdpbf16ps: see isa.cpp for its rate, and x keeps its precision.
#include "bf16_linear_avx512.h"

namespace sglang_er::cpu {

void bf16_linear_avx512(const Bf16LinearCall& call) { run_bf16_linear<Avx512>(call); }

}  // namespace sglang_er::cpu
