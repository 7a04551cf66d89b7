#include "sample_rows.h"
#include "softmax_rows.h"

namespace sglang_er::cpu {

void sample_rows_avx512(const SampleRowsCall& call) { run_sample_rows(call); }
void softmax_rows_avx512(const SoftmaxRowsCall& call) { run_softmax_rows(call); }

}  // namespace sglang_er::cpu
