// layer_ops on plain C++.
#include "layer_ops.h"

namespace sglang_er::cpu {

const LayerOps kLayerOpsPortable = kLayerOps;

}  // namespace sglang_er::cpu
