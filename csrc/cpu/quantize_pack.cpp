#include "isa.h"
#include "quantize_pack_op.h"

namespace sglang_er::cpu {

void quantize_pack(const QuantizePackCall& call) {
  switch (active_isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
    case Isa::kAvx512:
      return quantize_pack_avx512(call);
    case Isa::kAvx2:
      return quantize_pack_avx2(call);
    case Isa::kPortable:
      return quantize_pack_portable(call);
  }
}

}  // namespace sglang_er::cpu
