// kv_shadow_store on AVX2 (vec_avx2.h).
#include "kv_shadow_store.h"

namespace sglang_er::cpu {

void kv_shadow_store_avx2(const KvShadowStoreCall& call) { run_kv_shadow_store(call); }

}  // namespace sglang_er::cpu
