// paged_attention on AVX-512 (vec_avx512.h).
#include "paged_attention.h"

namespace sglang_er::cpu {

void paged_attention_avx512(const PagedAttentionCall& call) { run_paged_attention(call); }

}  // namespace sglang_er::cpu
