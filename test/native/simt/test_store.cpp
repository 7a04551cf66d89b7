// kv_shadow_store, its kernel whole: the bytes of the CPU's, and of loops for fp8, which the CPU has not.
#include <numeric>

#include "kv_shadow_op.h"
#include "kv_shadow_store_kernel.h"
#include "paged_pool.h"

namespace sglang_er::simt {
namespace {

using namespace cpu;
using namespace cuda;

template <class T>
void run(const Pool& pool, const Exact<int64_t>& slots, ShadowFormat format, const Shadow& shadow,
         Random& random) {
  const Dims& dims = pool.dims;
  const int elements = lane_elements(std::max(dims.head_dim, dims.value_dim));
  const auto part = [&](const Matrix& matrix, int dim, bool rotated, const Exact<uint8_t>& levels,
                        const Exact<uint16_t>& scales) {
    const int bytes = 2 * elements;
    const bool aligned = reinterpret_cast<uintptr_t>(matrix.data()) % bytes == 0 &&
                         matrix.stride * 2 % bytes == 0 && dim * 2 % bytes == 0;
    return ShadowPart{matrix.data(), matrix.stride, dim, aligned, rotated, levels.data(), scales.data()};
  };
  const bool int4 = format == ShadowFormat::kInt4;
  const KvShadowStoreParams params{
      {part(pool.keys, dims.head_dim, int4, shadow.keys, shadow.key_scales),
       part(pool.values, dims.value_dim, false, shadow.values, shadow.value_scales)},
      slots.data(),
      static_cast<int>(slots.size()) * 2 * dims.kv_heads,
      pool.slots,
      dims.kv_heads,
      format,
      rotation_norm(dims.head_dim)};
  const dim3 grid{static_cast<unsigned>((params.vectors + kStoreWarps - 1) / kStoreWarps)};
  const auto start = [&](auto kernel) {
    launch(kernel, grid, kStoreWarps * kWarpLanes, random, params, memory, 0);
  };
  elements == 2   ? start(kv_shadow_store_kernel<T, 2>)
  : elements == 4 ? start(kv_shadow_store_kernel<T, 4>)
                  : start(kv_shadow_store_kernel<T, 8>);
}

template <class T>
void check(DType type, const Dims& dims, int gap, Random& random) {
  Pool pool(random, dims, {{9, 1}, {4, 1}}, type, DType::kBFloat16, gap);
  for (int d = 0; d < dims.head_dim; ++d) {
    pool.keys.set(2, d, 0.0);
    pool.keys.set(3, d, pool.keys.at(3, d) * 1e-39);
  }
  std::vector<int64_t> order(static_cast<size_t>(pool.slots) - 1);  // one is left out
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<int64_t> with_others = order;
  with_others.insert(with_others.begin() + 3, {-1, pool.slots});  // outside of the pool
  const Exact<int64_t> slots(order), given(with_others);
  for (int bits : {8, 4}) {
    if (bits == 4 && (dims.head_dim % 32 != 0 || dims.value_dim % 32 != 0)) continue;
    const Shadow expected(pool, bits), actual(pool, bits);
    kv_shadow_store({pool.keys.data(), pool.values.data(), pool.keys.stride, pool.values.stride, type,
                     dims.kv_heads, dims.head_dim, dims.value_dim, slots.data(), slots.size(), bits,
                     expected.keys.data(), expected.values.data(), expected.key_scales.data(),
                     expected.value_scales.data(), 1});
    run<T>(pool, given, bits == 8 ? ShadowFormat::kInt8 : ShadowFormat::kInt4, actual, random);
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), static_cast<size_t>(a.size()) * sizeof(a[0])) == 0;
    };
    CHECK(same(actual.keys, expected.keys) && same(actual.values, expected.values));
    CHECK(same(actual.key_scales, expected.key_scales) && same(actual.value_scales, expected.value_scales));
  }
  const Shadow actual(pool, 8);
  run<T>(pool, given, ShadowFormat::kFp8, actual, random);
  for (int64_t slot : order) {
    for (int head = 0; head < dims.kv_heads; ++head) {
      const int64_t vector = slot * dims.kv_heads + head;
      for (bool value : {false, true}) {
        const int dim = value ? dims.value_dim : dims.head_dim;
        const Matrix& from = value ? pool.values : pool.keys;
        const auto at = [&](int d) { return static_cast<float>(from.at(slot, int64_t{head} * dim + d)); };
        float largest = 0.0f;
        for (int d = 0; d < dim; ++d) largest = std::max(largest, std::abs(at(d)));
        const uint16_t scale = shadow_scale_bits(largest, ShadowFormat::kFp8);
        CHECK((value ? actual.value_scales : actual.key_scales)[vector] == scale);
        for (int d = 0; d < dim; ++d)
          CHECK((value ? actual.values : actual.keys)[vector * dim + d] ==
                float_to_fp8(at(d) * shadow_inverse_scale(scale)));
      }
    }
  }
}

SIMT_TEST(kv_shadow_store_equals_the_cpu) {
  Random random(31);
  int gap = 0;
  for (const Dims& dims : {Dims{2, 2, 64, 64}, Dims{1, 1, 96, 128}, Dims{1, 1, 128, 32}, Dims{2, 2, 160, 96},
                           Dims{1, 1, 256, 64}, Dims{1, 1, 64, 256}, Dims{3, 3, 40, 72}}) {
    gap = 3 - gap;
    check<cuda::BFloat16>(DType::kBFloat16, dims, gap, random);
    check<__half>(DType::kFloat16, dims, 3 - gap, random);
  }
}

}  // namespace
}  // namespace sglang_er::simt
