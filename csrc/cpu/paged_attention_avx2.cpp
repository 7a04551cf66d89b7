// paged_attention on AVX2 (vec_avx2.h).
#include "paged_attention.h"

namespace sglang_er::cpu {

void paged_attention_avx2(const PagedAttentionCall& call) { run_paged_attention(call); }

}  // namespace sglang_er::cpu
