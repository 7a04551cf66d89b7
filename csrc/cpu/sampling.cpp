#include "isa.h"
#include "sampling_op.h"

namespace sglang_er::cpu {

void sample_rows(const SampleRowsCall& call) {
  switch (active_isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
    case Isa::kAvx512:
      return sample_rows_avx512(call);
    case Isa::kAvx2:
      return sample_rows_avx2(call);
    case Isa::kPortable:
      return sample_rows_portable(call);
  }
}

void softmax_rows(const SoftmaxRowsCall& call) {
  switch (active_isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
    case Isa::kAvx512:
      return softmax_rows_avx512(call);
    case Isa::kAvx2:
      return softmax_rows_avx2(call);
    case Isa::kPortable:
      return softmax_rows_portable(call);
  }
}

}  // namespace sglang_er::cpu
