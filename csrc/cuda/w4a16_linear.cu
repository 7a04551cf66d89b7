// w4a16_linear: out[M, N] = x[M, K] W[N, K]^T + bias, W int4 in groups of 128 (packed_weight.h), x and out
// bf16 or fp16 (SGLANG_ER_IS_HALF), fp32 sums. Blocks take 64 rows of x at most.
//
// Who computes what. w4_fragment.h has the indices: a warp multiplies 32 outputs of one group on the tensor
// cores, the packed words being operands as they lie. A block of 8 warps takes 128 outputs and a range of
// groups, four warps the even and four the odd ones, so that x in shared memory serves four warps and a small
// weight still fills the chip. Blocks that share outputs (splits of K) leave fp32 sums in the workspace, and
// the last one to come adds them in order. The cut depends on the weight's shape alone, a column of a product
// on no other column: a row's result does not depend on the batch.
//
// Bound: the packed weight, read once, 0.53 bytes each. By Little's law 4.3 TB/s * 700 ns / 132 is 23 KB that
// each multiprocessor must have under way at least. Here copies go to shared memory by cp.async, because what
// is under way then costs no registers, which the sums of 64 rows need, and it is the same code on sm_80. A
// step is 17 KB of weights; stages as memory allows, two of them in use. On sm_90, 96 KB are under way for up
// to 8 rows (two blocks of 5 stages), 64 KB for up to 16 and 32 rows, 32 KB for 64, where the products bound.
// A thread waits for its own words only; the barrier of a step is for x. Within a CUDA graph a launch begins
// to read its weight while the launch before it ends (dependent_launch.h).
#include "w4_linear_binding.h"
#include "w4a16_linear_kernel.h"

namespace sglang_er::cuda {
namespace {

void w4a16_linear(TensorView x, TensorView packed, TensorView scales_zeros, Optional<TensorView> bias,
                  TensorView out, int64_t group_size, TensorView partials, TensorView counters) {
  const DLDevice device = x.device();
  check_matrix(x, device, "x must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(is_type(x, dtype_code(), 16), "this library serves another dtype");
  const W4A16LinearParams params{.linear = linear_params(device, x.size(1), packed, scales_zeros, bias, out,
                                                         group_size, partials, counters),
                                 .x = static_cast<const uint16_t*>(x.data_ptr()),
                                 .x_stride = x.stride(0),
                                 .x_aligned = aligned(x.data_ptr(), 16) && x.stride(0) % 8 == 0};
  SGLANG_ER_CHECK(out.size(0) == x.size(0), "out must have the rows of x");
  if (x.size(0) == 0 || out.size(1) == 0) return;

  const OnDevice on_device(device);
  const cudaStream_t stream = current_stream(device);
  const bool dependent = may_depend(stream, "w4a16_linear");
  by_col_tiles(x.size(0), [&]<int ColTiles>() {
    launch_linear<W4A16Shared<ColTiles>>(w4a16_linear_kernel<kIsHalf, ColTiles>, params, stream, dependent,
                                         "w4a16_linear");
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(w4a16_linear, w4a16_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(partial_values, partial_values);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_counters, workspace_counters);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(capture_id, capture_id);

}  // namespace sglang_er::cuda
