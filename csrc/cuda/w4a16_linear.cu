// w4a16_linear: out[M, N] = x[M, K] W[N, K]^T + bias, W int4 in groups of 128 (packed_weight.h), x and out
// bf16 or fp16 (SGLANG_ER_IS_HALF), fp32 sums. More than 64 rows of x are taken 64 at a time.
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
// A thread waits for its own words only; the barrier of a step is for x.
#include "binding.h"
#include "w4a16_linear_kernel.h"

namespace sglang_er::cuda {
namespace {

constexpr bool kIsHalf = SGLANG_ER_IS_HALF;
constexpr int kMostRows = 64;

// Tiles of kCols rows of x that a launch computes: a power of two.
int col_tiles_of(int64_t m) {
  const int64_t rows = m < kMostRows ? m : kMostRows;
  int col_tiles = 1;
  while (col_tiles * mma::kCols < rows) col_tiles *= 2;
  return col_tiles;
}

// fp32 sums that the splits leave for `m` rows of x; none if K is not cut.
int64_t partials_of(const w4::Schedule& schedule, int64_t m) {
  if (schedule.splits == 1) return 0;
  return int64_t{schedule.tiles} * schedule.splits * w4::kTileRows * col_tiles_of(m) * mma::kCols;
}

template <int ColTiles>
void launch(const W4LinearParams& params, cudaStream_t stream) {
  const auto kernel = w4a16_linear_kernel<kIsHalf, ColTiles>;
  constexpr int kBytes = sizeof(Shared<ColTiles>);
  static_assert(kBytes <= Shared<ColTiles>::kBytes);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "w4a16_linear");
  const dim3 grid(params.schedule.tiles, params.schedule.splits);
  kernel<<<grid, kTileThreads, kBytes, stream>>>(params);
  check_cuda(cudaGetLastError(), "w4a16_linear");
}

void w4a16_linear(TensorView x, TensorView packed, TensorView scales_zeros, Optional<TensorView> bias,
                  TensorView out, int64_t group_size, TensorView partials, TensorView counters) {
  const DLDevice device = x.device();
  check_matrix(x, device, "x must be a matrix with contiguous rows");
  check_matrix(out, device, "out must be a matrix with contiguous rows");
  const DLDataTypeCode code = kIsHalf ? kDLFloat : kDLBfloat;
  SGLANG_ER_CHECK(is_type(x, code, 16) && is_type(out, code, 16), "this library serves another dtype");
  SGLANG_ER_CHECK(out.size(0) == x.size(0), "out must have the rows of x");
  SGLANG_ER_CHECK(group_size == w4::kGroup, "group_size must be 128");
  const PackedShape shape{out.size(1), x.size(1), w4::kGroup};
  check_packed(shape, packed, scales_zeros, device);
  SGLANG_ER_CHECK(aligned(packed.data_ptr(), 16) && aligned(scales_zeros.data_ptr(), 16),
                  "packed buffers must begin at multiples of 16 bytes");
  SGLANG_ER_CHECK(shape.cols < INT32_MAX - kStepInputs && shape.rows < INT32_MAX - w4::kTileRows,
                  "the weight has too many rows or columns");
  if (x.size(0) == 0 || shape.rows == 0) return;
  const bool has_bias = bias.has_value();
  const bool bias_is_float = has_bias && is_type(bias.value(), kDLFloat, 32);
  if (has_bias) {
    check_on(bias.value(), device);
    SGLANG_ER_CHECK(bias.value().IsContiguous() && bias.value().numel() == shape.rows &&
                        (bias_is_float || is_type(bias.value(), code, 16)),
                    "bias must be contiguous, one value per output, of the dtype of x or float32");
  }
  const w4::Schedule schedule = w4::schedule(shape.rows, shape.cols);
  check_on(partials, device);
  check_on(counters, device);
  SGLANG_ER_CHECK(partials.IsContiguous() && is_type(partials, kDLFloat, 32) &&
                      aligned(partials.data_ptr(), 16) &&
                      partials.numel() >= partials_of(schedule, x.size(0)),
                  "the workspace is too small");
  SGLANG_ER_CHECK(counters.IsContiguous() && is_type(counters, kDLInt, 32) &&
                      counters.numel() >= (schedule.splits == 1 ? 0 : schedule.tiles),
                  "the workspace has too few counters");

  const OnDevice on_device(device);
  const cudaStream_t stream = current_stream(device);
  for (int64_t first = 0; first < x.size(0); first += kMostRows) {
    const int64_t left = x.size(0) - first;
    auto* rows = static_cast<uint16_t*>(x.data_ptr()) + first * x.stride(0);
    auto* out_rows = static_cast<uint16_t*>(out.data_ptr()) + first * out.stride(0);
    const W4LinearParams params{.x = rows,
                                .x_stride = x.stride(0),
                                .x_aligned = aligned(rows, 16) && x.stride(0) % 8 == 0,
                                .m = static_cast<int>(left < kMostRows ? left : kMostRows),
                                .packed = static_cast<const uint8_t*>(packed.data_ptr()),
                                .scales_zeros = static_cast<const uint16_t*>(scales_zeros.data_ptr()),
                                .shape = shape,
                                .schedule = schedule,
                                .bias = has_bias ? bias.value().data_ptr() : nullptr,
                                .bias_is_float = bias_is_float,
                                .out = out_rows,
                                .out_stride = out.stride(0),
                                .out_aligned = aligned(out_rows, 8) && out.stride(0) % 4 == 0,
                                .partials = static_cast<float4*>(partials.data_ptr()),
                                .counters = static_cast<uint32_t*>(counters.data_ptr())};
    if (params.m <= 8) {
      launch<1>(params, stream);
    } else if (params.m <= 16) {
      launch<2>(params, stream);
    } else if (params.m <= 32) {
      launch<4>(params, stream);
    } else {
      launch<8>(params, stream);
    }
  }
}

// What a call needs for `m` rows of x and a weight [rows, cols]: fp32 sums.
int64_t partial_values(int64_t rows, int64_t cols, int64_t m) {
  return rows == 0 || m == 0 ? 0 : partials_of(w4::schedule(rows, cols), m);
}
// Counters that serve every weight.
int64_t workspace_counters() { return w4::kMostParts; }

// Which capture records what is launched now on torch's current stream of this tensor's device; 0 outside of
// captures.
int64_t capture_id(TensorView x) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check_cuda(cudaStreamGetCaptureInfo(current_stream(x.device()), &status, &id), "w4a16_linear");
  return status == cudaStreamCaptureStatusActive ? static_cast<int64_t>(id) : 0;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(w4a16_linear, w4a16_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(partial_values, partial_values);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_counters, workspace_counters);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(capture_id, capture_id);

}  // namespace sglang_er::cuda
