// w4a8_linear: out[M, N] = x^[M, K] W[N, K]^T + bias, W int4 in groups of 128 (packed_weight.h), x^ = x
// rounded to int8 in groups of 128, x and out bf16 or fp16 (SGLANG_ER_IS_HALF), fp32 sums of exact integer
// products.
//
// Who computes what. Two launches. A warp of the first takes a row's group of x: levels, their scale, their
// sum. The second one's blocks are those of w4a16_linear, with the indices of w4a8_fragment.h: half as many
// products, as m16n8k32 takes twice the inputs, three operations a word in the place of eight, no sums of x.
//
// Bound: the packed weight, read once, until some 64 rows; from there on what a warp has to issue, half of
// w4a16_linear's (docs/gpu.md). That one rounds less, and is as fast as long as both wait for the weight.
// Within a CUDA graph the second launch reads its weight while the first one runs, and that one begins while
// the launch before it ends (dependent_launch.h).
#include "w4_linear_binding.h"
#include "w4a8_linear_kernel.h"

namespace sglang_er::cuda {
namespace {

// Groups of a row of levels and numbers, for a weight of `cols` columns: an even number.
int64_t level_groups(int64_t cols) { return (cols + kStepInputs - 1) / kStepInputs * w4::kPhases; }

void w4a8_linear(TensorView x, TensorView packed, TensorView scales_zeros, Optional<TensorView> bias,
                 TensorView out, int64_t group_size, TensorView levels, TensorView numbers,
                 TensorView partials, TensorView counters) {
  const DLDevice device = x.device();
  check_matrix(x, device, "x must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(is_type(x, dtype_code(), 16), "this library serves another dtype");
  const int64_t groups = level_groups(x.size(1)), items = x.size(0) * groups;
  check_on(levels, device);
  check_on(numbers, device);
  SGLANG_ER_CHECK(levels.IsContiguous() && is_type(levels, kDLInt, 8) && aligned(levels.data_ptr(), 16) &&
                      levels.numel() == items * w4::kGroup,
                  "levels do not fit x");
  SGLANG_ER_CHECK(numbers.IsContiguous() && is_type(numbers, kDLFloat, 32) &&
                      aligned(numbers.data_ptr(), 16) && numbers.numel() == items * 2,
                  "numbers do not fit x");
  const QuantizedRows rows{static_cast<uint8_t*>(levels.data_ptr()),
                           static_cast<w4a8::RowNumbers*>(numbers.data_ptr()), static_cast<int>(groups)};
  const W4A8LinearParams params{.linear = linear_params(device, x.size(1), packed, scales_zeros, bias, out,
                                                        group_size, partials, counters),
                                .x = rows};
  SGLANG_ER_CHECK(out.size(0) == x.size(0), "out must have the rows of x");
  if (x.size(0) == 0 || out.size(1) == 0) return;

  const OnDevice on_device(device);
  const cudaStream_t stream = current_stream(device);
  const bool dependent = may_depend(stream, "w4a8_linear");
  const QuantizeRowsParams quantize{.x = static_cast<const uint16_t*>(x.data_ptr()),
                                    .x_stride = x.stride(0),
                                    .cols = x.size(1),
                                    .to = rows};
  constexpr int kWarps = kQuantizeThreads / mma::kLanes;
  const dim3 grid(static_cast<unsigned>((groups + kWarps - 1) / kWarps), params.linear.m);
  if (groups > 0) {
    check_cuda(
        launch_kernel(quantize_rows_kernel<kIsHalf>, grid, kQuantizeThreads, 0, stream, dependent, quantize),
        "w4a8_linear");
  }
  by_col_tiles(x.size(0), [&]<int ColTiles>() {
    launch_linear<W4A8Shared<ColTiles>>(w4a8_linear_kernel<kIsHalf, ColTiles>, params, stream, dependent,
                                        "w4a8_linear");
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(w4a8_linear, w4a8_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(level_groups, level_groups);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(partial_values, partial_values);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_counters, workspace_counters);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(capture_id, capture_id);

}  // namespace sglang_er::cuda
