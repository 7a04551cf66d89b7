#include "bf16_linear_op.h"
#include "isa.h"

namespace sglang_er::cpu {

void bf16_linear(const Bf16LinearCall& call) {
  switch (active_isa()) {
    case Isa::kAmx:
      return bf16_linear_amx(call);
    case Isa::kAvx512Bf16:
      return bf16_linear_avx512_bf16(call);
    case Isa::kAvx512:
      return bf16_linear_avx512(call);
    case Isa::kAvx2:
      return bf16_linear_avx2(call);
    case Isa::kPortable:
      return bf16_linear_portable(call);
  }
}

}  // namespace sglang_er::cpu
