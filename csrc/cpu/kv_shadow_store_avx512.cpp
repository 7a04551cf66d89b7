// kv_shadow_store on AVX-512 (vec_avx512.h).
#include "kv_shadow_store.h"

namespace sglang_er::cpu {

void kv_shadow_store_avx512(const KvShadowStoreCall& call) { run_kv_shadow_store(call); }

}  // namespace sglang_er::cpu
