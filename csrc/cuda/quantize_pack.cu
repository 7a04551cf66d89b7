// quantize_pack: a weight [N, K], bf16, fp16 or fp32, to int4 in groups of 64 or 128 (quantize.h has the
// rule, packed_weight.h the layout). Rows may lie any distance apart.
//
// One warp a block of 16 rows and a group; quantize_lane.h says which lane takes what. One pass: a weight is
// read once, into registers, and every packed byte written once. Neighbouring warps take neighbouring groups,
// so a row is read in whole lines. Bound: memory, 2 (or 4) bytes read and 0.53 written a weight; at four
// 16-byte loads a lane and 32 warps a multiprocessor, 64 KB are under way.
//
// Clip search (clip_search.h), by a template argument, so that without it nothing is there of it: units of
// the lane's 32 numbers in registers, about 10 integer operations a weight and candidate: that, not memory,
// is then the bound.
//
// Bits of the reference: no contraction (the build forbids it), divisions rounded to nearest.
#include <cuda_fp16.h>

#include "binding.h"
#include "sglang_er/quantize_lane.h"

namespace sglang_er::cuda {
namespace {

constexpr int kBlockWarps = 4;

struct QuantizeParams {
  const void* weight;
  int64_t stride;
  bool aligned;  // rows begin at multiples of 16 bytes
  PackedShape shape;
  uint8_t* packed;
  uint16_t* scales_zeros;
};

struct BFloat16 {
  uint16_t bits;
};
__device__ __forceinline__ float to_float(BFloat16 value) { return bf16_to_float(value.bits); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(float value) { return value; }

// A lane's four runs of 8 neighbours, of which the first count[quarter] exist. All loads come before the
// first use.
template <class T, int Group>
__device__ __forceinline__ void load_runs(const T* from, const int (&count)[4], bool aligned,
                                          float (&x)[4][quantize::kRun]) {
  constexpr int kLoads = quantize::kRun * sizeof(T) / 16;
  if (aligned && count[3] == quantize::kRun) {  // then all of them are whole
    union {
      uint4 loads[4][kLoads];
      T values[4][quantize::kRun];
    } runs;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const auto* run = reinterpret_cast<const uint4*>(from + quantize::run_input<Group>(0, quarter));
#pragma unroll
      for (int i = 0; i < kLoads; ++i) runs.loads[quarter][i] = __ldcs(run + i);
    }
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll
      for (int i = 0; i < quantize::kRun; ++i) x[quarter][i] = to_float(runs.values[quarter][i]);
    }
  } else {
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const T* run = from + quantize::run_input<Group>(0, quarter);
#pragma unroll
      for (int i = 0; i < quantize::kRun; ++i) x[quarter][i] = i < count[quarter] ? to_float(run[i]) : 0.0f;
    }
  }
}

// Of a group's rows, the code of the range that loses least; all lanes of the warp take part.
template <int Group>
__device__ __forceinline__ GroupCode clipped(const float (&x)[4][quantize::kRun], const int (&count)[4],
                                             float lo, float hi, const GroupCode& whole) {
  clip::Search search = clip::begin(lo, hi, whole);
  int units[4][quantize::kRun];
  quantize::lane_units(x, whole, units);
#pragma unroll 1  // eight times the code would not fit the instruction cache
  for (int i = 0; i < clip::kCandidates; ++i) {
    const clip::Candidate candidate = clip::candidate(search, i);
    uint32_t squares = quantize::lane_squares(units, count, candidate);
#pragma unroll
    for (int apart = quantize::Lanes<Group>::kPerRow / 2; apart > 0; apart /= 2)
      squares += __shfl_xor_sync(0xFFFFFFFFu, squares, apart);
    clip::compare(search, i, candidate, squares);
  }
  return search.best;
}

template <class T, int Group, bool ClipSearch>
__global__ void __launch_bounds__(kBlockWarps * 32)
    quantize_pack_kernel(const __grid_constant__ QuantizeParams params) {
  using Lanes = quantize::Lanes<Group>;
  const int lane = threadIdx.x % 32;
  const int64_t groups = params.shape.groups();
  const int64_t item = int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / 32;
  if (item >= params.shape.row_blocks() * groups) return;
  const int64_t block = item / groups, group = item % groups;
  uint8_t* packed = params.packed + item * params.shape.group_bytes();
  uint16_t* scales_zeros = params.scales_zeros + item * (2 * kRowBlock);

#pragma unroll
  for (int pass = 0; pass < Lanes::kPasses; ++pass) {
    const int block_row = pass * Lanes::kRows + quantize::lane_row<Group>(lane);
    const int64_t row = block * kRowBlock + block_row;
    const bool exists = row < params.shape.rows;
    const int64_t first = group * Group + quantize::run_input<Group>(quantize::lane_part<Group>(lane), 0);
    const T* weight = static_cast<const T*>(params.weight) + (exists ? row : 0) * params.stride + first;
    float x[4][quantize::kRun];
    int count[4];
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t left = exists ? params.shape.cols - first - quantize::run_input<Group>(0, quarter) : 0;
      count[quarter] = static_cast<int>(left < 0 ? 0 : left < quantize::kRun ? left : quantize::kRun);
    }
    load_runs<T, Group>(weight, count, params.aligned, x);

    // fminf takes -0 for less than +0, as the rule of a group of zeros wants.
    float lo = INFINITY, hi = -INFINITY;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll
      for (int i = 0; i < quantize::kRun; ++i) {
        if (i >= count[quarter]) continue;
        lo = fminf(lo, x[quarter][i]);
        hi = fmaxf(hi, x[quarter][i]);
      }
    }
#pragma unroll
    for (int apart = Lanes::kPerRow / 2; apart > 0; apart /= 2) {
      lo = fminf(lo, __shfl_xor_sync(0xFFFFFFFFu, lo, apart));
      hi = fmaxf(hi, __shfl_xor_sync(0xFFFFFFFFu, hi, apart));
    }
    GroupCode code = exists ? group_code(lo, hi) : GroupCode{};
    if constexpr (ClipSearch) {
      const GroupCode best = clipped<Group>(x, count, lo, hi, code);
      if (exists) code = best;
    }
    if (quantize::lane_part<Group>(lane) == 0) {
      scales_zeros[block_row] = code.scale_bits;
      scales_zeros[kRowBlock + block_row] = code.zero_bits;
    }

    uint32_t words[quantize::kLaneWords];
#pragma unroll
    for (int which = 0; which < quantize::kLaneWords; ++which)
      words[which] = quantize::lane_word(x, count, which, code);
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      const bool low = quantize::sent_word<Group>(lane, turn, 0) == 0;  // else the upper of each pair goes
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        // Both candidates by constant index: an index known at run time would move the array to memory.
        uint32_t& lower = words[turn == 0 ? 2 * which : which];
        uint32_t& upper = words[turn == 0 ? 2 * which + 1 : which + 2];
        const uint32_t come =
            __shfl_sync(0xFFFFFFFFu, low ? lower : upper, quantize::partner<Group>(lane, turn));
        (low ? lower : upper) = come;
      }
    }
    *reinterpret_cast<uint4*>(packed + quantize::store_byte<Group>(lane, pass)) = {words[0], words[1],
                                                                                   words[2], words[3]};
  }
}

template <class T, bool ClipSearch>
void launch(const QuantizeParams& params, cudaStream_t stream) {
  const int64_t items = params.shape.row_blocks() * params.shape.groups();
  const auto blocks = static_cast<unsigned>((items + kBlockWarps - 1) / kBlockWarps);
  if (params.shape.group_size == 128) {
    quantize_pack_kernel<T, 128, ClipSearch><<<blocks, kBlockWarps * 32, 0, stream>>>(params);
  } else {
    quantize_pack_kernel<T, 64, ClipSearch><<<blocks, kBlockWarps * 32, 0, stream>>>(params);
  }
  check_cuda(cudaGetLastError(), "quantize_pack");
}

template <class T>
void launch(const QuantizeParams& params, bool clip_search, cudaStream_t stream) {
  clip_search ? launch<T, true>(params, stream) : launch<T, false>(params, stream);
}

void quantize_pack(TensorView weight, TensorView packed, TensorView scales_zeros, int64_t group_size,
                   bool clip_search) {
  const DLDevice device = weight.device();
  check_matrix(weight, device, "weight must be a matrix with contiguous rows");
  SGLANG_ER_CHECK(group_size == 64 || group_size == 128, "group_size must be 64 or 128");
  const PackedShape shape{weight.size(0), weight.size(1), static_cast<int>(group_size)};
  check_packed(shape, packed, scales_zeros, device);
  SGLANG_ER_CHECK(aligned(packed.data_ptr(), 16), "packed must begin at a multiple of 16 bytes");
  SGLANG_ER_CHECK(shape.row_blocks() * shape.groups() <= int64_t{INT32_MAX} * kBlockWarps,
                  "the weight is too large");
  if (shape.packed_bytes() == 0) return;
  const QuantizeParams params{
      .weight = weight.data_ptr(),
      .stride = weight.stride(0),
      .aligned = aligned(weight.data_ptr(), 16) && weight.stride(0) * (weight.dtype().bits / 8) % 16 == 0,
      .shape = shape,
      .packed = static_cast<uint8_t*>(packed.data_ptr()),
      .scales_zeros = static_cast<uint16_t*>(scales_zeros.data_ptr())};
  const OnDevice on_device(device);
  const cudaStream_t stream = current_stream(device);
  if (is_type(weight, kDLBfloat, 16)) {
    launch<BFloat16>(params, clip_search, stream);
  } else if (is_type(weight, kDLFloat, 16)) {
    launch<__half>(params, clip_search, stream);
  } else if (is_type(weight, kDLFloat, 32)) {
    launch<float>(params, clip_search, stream);
  } else {
    TVM_FFI_THROW(TypeError) << "weight must be bfloat16, float16 or float32";
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_pack, quantize_pack);

}  // namespace sglang_er::cuda
