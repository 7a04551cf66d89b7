#include "simt/cuda_runtime.h"

namespace sglang_er::cuda {
alignas(128) uint8_t memory[kSharedBytes];
}  // namespace sglang_er::cuda
