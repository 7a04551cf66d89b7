// The call of kv_shadow_store, as the bindings hand it to the kernel of the active instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace sglang_er::cpu {

// Quantizes the slots of one layer's pool into its shadow (kv_shadow.h has the layout).
struct KvShadowStoreCall {
  const void* keys;    // [pool slots, kv_heads, head_dim], kv_type, slots key_stride elements apart
  const void* values;  // [pool slots, kv_heads, value_dim], kv_type, slots value_stride elements apart
  int64_t key_stride;
  int64_t value_stride;
  DType kv_type;
  int kv_heads;
  int head_dim;
  int value_dim;
  const int64_t* slots;
  int64_t count;
  int bits;  // 8, 4
  void* shadow_keys;
  void* shadow_values;
  uint16_t* key_scales;
  uint16_t* value_scales;
  int threads;
};

void kv_shadow_store(const KvShadowStoreCall& call);  // the active instruction set

void kv_shadow_store_portable(const KvShadowStoreCall& call);
void kv_shadow_store_avx2(const KvShadowStoreCall& call);
void kv_shadow_store_avx512(const KvShadowStoreCall& call);

}  // namespace sglang_er::cpu
