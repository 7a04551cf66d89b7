// layer_ops on AVX-512.
#include "layer_ops.h"

namespace sglang_er::cpu {

const LayerOps kLayerOpsAvx512 = kLayerOps;

}  // namespace sglang_er::cpu
