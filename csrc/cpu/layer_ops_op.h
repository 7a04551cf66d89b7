// What lies between the linear layers of a decoder layer, on fp32 activations: residual, norm, rotary
// embedding, KV store and the gated activation. Every function treats each token alone: a token's result does
// not depend on the others nor on threads.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace sglang_er::cpu {

// hidden[T, H] += delta[T, H] (null: nothing); out[T, H] = hidden / rms(hidden) * weight[H].
struct AddRmsNormCall {
  float* hidden;
  const float* delta;
  const void* weight;
  DType weight_type;
  float eps;
  float* out;
  int64_t tokens;
  int64_t size;
  int threads;
};

// Splits qkv[T, (q_heads + 2 kv_heads) * head_dim] into heads; normalizes q and k heads (if the model does),
// rotates them in place, and stores k and v in the pool's slots.
struct RotateAndStoreCall {
  float* qkv;
  int64_t tokens;
  int q_heads;
  int kv_heads;
  int head_dim;
  int rotary_dim;       // the first rotary_dim elements of a head are rotated
  bool neox;            // pairs are (i, i + rotary_dim / 2), else (2i, 2i + 1)
  const void* cos_sin;  // [positions, rotary_dim]: cosines, then sines
  DType cos_sin_type;
  const void* q_norm;  // [head_dim] or null
  const void* k_norm;  // [head_dim] or null
  DType norm_type;
  float eps;
  const int64_t* positions;  // [T]
  const int64_t* slots;      // [T]
  void* keys;                // [slots, kv_heads, head_dim], slots key_stride elements apart
  void* values;
  int64_t key_stride;
  int64_t value_stride;
  DType kv_type;
  uint8_t* shadow_valid;  // [slots] or null: what is stored anew is not in the shadow yet
  int threads;
};

// out[T, I] = silu(gate_up[T, 0:I]) * gate_up[T, I:2I].
struct SiluAndMulCall {
  const float* gate_up;
  float* out;
  int64_t tokens;
  int64_t size;
  int threads;
};

struct LayerOps {
  void (*add_rms_norm)(const AddRmsNormCall& call);
  void (*rotate_and_store)(const RotateAndStoreCall& call);
  void (*silu_and_mul)(const SiluAndMulCall& call);
};

const LayerOps& layer_ops();  // of the active instruction set

extern const LayerOps kLayerOpsPortable;
extern const LayerOps kLayerOpsAvx2;
extern const LayerOps kLayerOpsAvx512;

}  // namespace sglang_er::cpu
