#include "isa.h"
#include "paged_attention_op.h"

namespace sglang_er::cpu {

void paged_attention(const PagedAttentionCall& call) {
  switch (active_isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
    case Isa::kAvx512:
      return paged_attention_avx512(call);
    case Isa::kAvx2:
      return paged_attention_avx2(call);
    case Isa::kPortable:
      return paged_attention_portable(call);
  }
}

}  // namespace sglang_er::cpu
