#include "isa.h"
#include "w4a8_linear_op.h"

namespace sglang_er::cpu {

void w4a8_linear(const W4A8Call& call) {
  in_passes(call, [](const W4A8Call& pass) {
    switch (active_isa()) {
      case Isa::kAvx512Bf16:
      case Isa::kAmx:
        return w4a8_linear_amx(pass);
      case Isa::kAvx512:
        return has_avx512_vnni() ? w4a8_linear_avx512_vnni(pass) : w4a8_linear_avx2(pass);
      case Isa::kAvx2:
        return w4a8_linear_avx2(pass);
      case Isa::kPortable:
        return w4a8_linear_portable(pass);
    }
  });
}

}  // namespace sglang_er::cpu
