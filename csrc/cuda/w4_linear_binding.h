// What the bindings of w4a16_linear and w4a8_linear share: checks, workspace, launches.
#pragma once

#include "binding.h"
#include "w4_linear_block.h"

namespace sglang_er::cuda {

inline constexpr bool kIsHalf = SGLANG_ER_IS_HALF;
inline constexpr int kMostChunks = 4;  // of kMostRows rows, in a call
// Whether launches may be dependent ones (dependent_launch.h): the library is for one target.
inline constexpr int kTargets[] = {__CUDA_ARCH_LIST__};
inline constexpr bool kMayDepend = kTargets[0] >= 900;

inline int chunks_of(int64_t m) { return static_cast<int>((m + kMostRows - 1) / kMostRows); }

// Tiles of kCols rows of x that a block computes: a power of two.
inline int col_tiles_of(int64_t m) {
  const int64_t rows = m < kMostRows ? m : kMostRows;
  int col_tiles = 1;
  while (col_tiles * mma::kCols < rows) col_tiles *= 2;
  return col_tiles;
}

// fp32 sums that the splits leave for `m` rows of x; none if K is not cut.
inline int64_t partials_of(const w4::Schedule& schedule, int64_t m) {
  if (schedule.splits == 1) return 0;
  return int64_t{schedule.tiles} * chunks_of(m) * schedule.splits * w4::kTileRows * col_tiles_of(m) *
         mma::kCols;
}

inline DLDataTypeCode dtype_code() { return kIsHalf ? kDLFloat : kDLBfloat; }

// Checks all but x, which has out's rows and `cols` columns.
inline W4LinearParams linear_params(DLDevice device, int64_t cols, TensorView packed, TensorView scales_zeros,
                                    Optional<TensorView> bias, TensorView out, int64_t group_size,
                                    TensorView partials, TensorView counters) {
  check_matrix(out, device, "out must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(is_type(out, dtype_code(), 16), "this library serves another dtype");
  SGLANG_ER_CHECK(out.size(0) <= kMostRows * kMostChunks, "x has too many rows");
  SGLANG_ER_CHECK(group_size == w4::kGroup, "group_size must be 128");
  const PackedShape shape{out.size(1), cols, w4::kGroup};
  check_packed(shape, packed, scales_zeros, device);
  SGLANG_ER_CHECK(aligned(packed.data_ptr(), 16) && aligned(scales_zeros.data_ptr(), 16),
                  "packed buffers must begin at multiples of 16 bytes");
  constexpr int64_t kMostTiles = 65535;  // of a grid's second dimension
  SGLANG_ER_CHECK(shape.cols < INT32_MAX - kStepInputs && shape.rows <= kMostTiles * w4::kTileRows,
                  "the weight has too many rows or columns");
  const bool has_bias = bias.has_value();
  const bool bias_is_float = has_bias && is_type(bias.value(), kDLFloat, 32);
  if (has_bias) {
    check_on(bias.value(), device);
    SGLANG_ER_CHECK(bias.value().IsContiguous() && bias.value().numel() == shape.rows &&
                        (bias_is_float || is_type(bias.value(), dtype_code(), 16)),
                    "bias must be contiguous, one value per output, of the dtype of x or float32");
  }
  const w4::Schedule schedule = w4::schedule(shape.rows, shape.cols);
  check_on(partials, device);
  check_on(counters, device);
  SGLANG_ER_CHECK(partials.IsContiguous() && is_type(partials, kDLFloat, 32) &&
                      aligned(partials.data_ptr(), 16) &&
                      partials.numel() >= partials_of(schedule, out.size(0)),
                  "the workspace is too small");
  SGLANG_ER_CHECK(
      counters.IsContiguous() && is_type(counters, kDLInt, 32) &&
          counters.numel() >= (schedule.splits == 1 ? 0 : int64_t{schedule.tiles} * chunks_of(out.size(0))),
      "the workspace has too few counters");
  return {.m = static_cast<int>(out.size(0)),
          .packed = static_cast<const uint8_t*>(packed.data_ptr()),
          .scales_zeros = static_cast<const uint16_t*>(scales_zeros.data_ptr()),
          .shape = shape,
          .schedule = schedule,
          .bias = has_bias ? bias.value().data_ptr() : nullptr,
          .bias_is_float = bias_is_float,
          .out = static_cast<uint16_t*>(out.data_ptr()),
          .out_stride = out.stride(0),
          .out_aligned = aligned(out.data_ptr(), 8) && out.stride(0) % 4 == 0,
          .partials = static_cast<float4*>(partials.data_ptr()),
          .counters = static_cast<uint32_t*>(counters.data_ptr())};
}

// `kernel<<<grid, threads, bytes, stream>>>(params)`; `dependent`: it may start early.
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int bytes, cudaStream_t stream,
                          bool dependent, const Params& params) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// One launch of `kernel` for all tiles, splits and chunks of rows; `Shared`: what a block has of shared
// memory.
template <class Shared, class Params>
void launch_linear(void (*kernel)(Params), const Params& params, cudaStream_t stream, bool dependent,
                   const char* op) {
  constexpr int kBytes = sizeof(Shared);
  static_assert(kBytes <= SGLANG_ER_SHARED_KB * 1024 - 1024);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), op);
  const W4LinearParams& linear = params.linear;
  // Blocks that differ in their chunk of rows only are neighbours in time, and share weights in L2.
  const dim3 grid(chunks_of(linear.m), linear.schedule.tiles, linear.schedule.splits);
  check_cuda(launch_kernel(kernel, grid, kTileThreads, kBytes, stream, dependent, params), op);
}

// launch.operator()<ColTiles>() for `m` rows of x.
template <class Launch>
void by_col_tiles(int64_t m, const Launch& launch) {
  switch (col_tiles_of(m)) {
    case 1:
      return launch.template operator()<1>();
    case 2:
      return launch.template operator()<2>();
    case 4:
      return launch.template operator()<4>();
    default:
      return launch.template operator()<8>();
  }
}

// Which capture records what is launched now on this stream; 0 outside of captures.
inline int64_t capture_of(cudaStream_t stream, const char* op) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &id), op);
  return status == cudaStreamCaptureStatusActive ? static_cast<int64_t>(id) : 0;
}

inline bool may_depend(cudaStream_t stream, const char* op) {
  return kMayDepend && capture_of(stream, op) != 0;
}

// What a call needs for `m` rows of x and a weight [rows, cols]: fp32 sums.
inline int64_t partial_values(int64_t rows, int64_t cols, int64_t m) {
  return rows == 0 || m == 0 ? 0 : partials_of(w4::schedule(rows, cols), m);
}
// Counters that serve every call.
inline int64_t workspace_counters() { return int64_t{w4::kMostParts} * kMostChunks; }
inline int64_t capture_id(TensorView x) { return capture_of(current_stream(x.device()), "capture_id"); }

}  // namespace sglang_er::cuda
