#include "isa.h"
#include "kv_shadow_op.h"

namespace sglang_er::cpu {

void kv_shadow_store(const KvShadowStoreCall& call) {
  switch (active_isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
    case Isa::kAvx512:
      return kv_shadow_store_avx512(call);
    case Isa::kAvx2:
      return kv_shadow_store_avx2(call);
    case Isa::kPortable:
      return kv_shadow_store_portable(call);
  }
}

}  // namespace sglang_er::cpu
