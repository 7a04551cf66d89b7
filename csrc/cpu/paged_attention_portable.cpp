// paged_attention in plain C++ (vec_portable.h).
#include "paged_attention.h"

namespace sglang_er::cpu {

void paged_attention_portable(const PagedAttentionCall& call) { run_paged_attention(call); }

}  // namespace sglang_er::cpu
