// layer_ops on AVX2.
#include "layer_ops.h"

namespace sglang_er::cpu {

const LayerOps kLayerOpsAvx2 = kLayerOps;

}  // namespace sglang_er::cpu
