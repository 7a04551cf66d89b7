#include "isa.h"
#include "w4a16_linear_op.h"

namespace sglang_er::cpu {
namespace {

// Rows of x handled by one pass over the weight: enough that the FMA units and not the memory are the limit,
// few enough that the rearranged activations stay in cache.
constexpr int64_t kRowsPerPass = 128;

void w4a16_linear_pass(const W4A16Call& call) {
  switch (active_isa()) {
    case Isa::kAvx512Bf16:
      // bf16 products would round other activations, which W4A16 promises not to do.
      return call.x_type == DType::kBFloat16 ? w4a16_linear_avx512_bf16(call) : w4a16_linear_avx512(call);
    case Isa::kAvx512:
      return w4a16_linear_avx512(call);
    case Isa::kAvx2:
      return w4a16_linear_avx2(call);
    case Isa::kPortable:
      return w4a16_linear_portable(call);
  }
}

}  // namespace

void w4a16_linear(const W4A16Call& call) {
  const int64_t bytes = element_bytes(call.x_type);
  for (int64_t row = 0; row < call.m; row += kRowsPerPass) {
    W4A16Call pass = call;
    pass.x = static_cast<const char*>(call.x) + row * call.x_stride * bytes;
    pass.out = static_cast<char*>(call.out) + row * call.out_stride * bytes;
    pass.m = call.m - row < kRowsPerPass ? call.m - row : kRowsPerPass;
    w4a16_linear_pass(pass);
  }
}

}  // namespace sglang_er::cpu
