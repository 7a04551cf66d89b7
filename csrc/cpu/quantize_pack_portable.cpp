// quantize_pack as the compiler vectorizes it for this file's flags (CMakeLists.txt).
#include "quantize_pack.h"

namespace sglang_er::cpu {

void quantize_pack_portable(const QuantizePackCall& call) { run_quantize_pack_any(call); }

}  // namespace sglang_er::cpu
