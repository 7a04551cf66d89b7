// kv_shadow_store in plain C++ (vec_portable.h).
#include "kv_shadow_store.h"

namespace sglang_er::cpu {

void kv_shadow_store_portable(const KvShadowStoreCall& call) { run_kv_shadow_store(call); }

}  // namespace sglang_er::cpu
