#include "isa.h"
#include "w4a16_linear_op.h"

namespace sglang_er::cpu {

void w4a16_linear(const W4A16Call& call) {
  in_passes(call, [](const W4A16Call& pass) {
    switch (active_isa()) {
      case Isa::kAvx512Bf16:
        // bf16 products would round other activations, which W4A16 promises not to do.
        return pass.x_type == DType::kBFloat16 ? w4a16_linear_avx512_bf16(pass) : w4a16_linear_avx512(pass);
      case Isa::kAmx:
      case Isa::kAvx512:
        return w4a16_linear_avx512(pass);
      case Isa::kAvx2:
        return w4a16_linear_avx2(pass);
      case Isa::kPortable:
        return w4a16_linear_portable(pass);
    }
  });
}

}  // namespace sglang_er::cpu
