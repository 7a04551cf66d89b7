// quantize_pack, its kernel whole: the bytes of the CPU's.
#include "packed.h"
#include "quantize_pack_kernel.h"

namespace sglang_er::simt {
namespace {

using namespace cpu;
using namespace cuda;

struct Size {
  int64_t rows, cols;
  int gap;
};

template <class T, int Group, bool ClipSearch>
void check(const Matrix& weight, Random& random) {
  const Packed truth = pack(weight, Group, 1, ClipSearch);
  const Exact<uint4> packed(truth.packed.size() / 16, {0xABABABAB, 0xABABABAB, 0xABABABAB, 0xABABABAB});
  const Exact<uint16_t> scales_zeros(truth.scales_zeros.size(), 0xABAB);
  const QuantizeParams params{
      .weight = weight.data(),
      .stride = weight.stride,
      .aligned = reinterpret_cast<uintptr_t>(weight.data()) % 16 == 0 && weight.stride * sizeof(T) % 16 == 0,
      .shape = truth.shape,
      .packed = reinterpret_cast<uint8_t*>(packed.data()),
      .scales_zeros = scales_zeros.data()};
  const int64_t items = truth.shape.row_blocks() * truth.shape.groups();
  launch(quantize_pack_kernel<T, Group, ClipSearch>,
         dim3{static_cast<unsigned>((items + kPackWarps - 1) / kPackWarps)}, kPackWarps * 32, random, params,
         memory, 0);
  CHECK(std::memcmp(packed.data(), truth.packed.data(), static_cast<size_t>(truth.packed.size())) == 0);
  CHECK(std::memcmp(scales_zeros.data(), truth.scales_zeros.data(),
                    static_cast<size_t>(scales_zeros.size()) * 2) == 0);
}

template <class T>
void check_all(DType type, Random& random) {
  for (const Size& size :
       {Size{1, 1, 0}, Size{16, 128, 0}, Size{33, 300, 3}, Size{20, 1032, 0}, Size{47, 520, 5}}) {
    Matrix weight = Matrix::random(random, type, size.rows, size.cols, size.gap);
    for (int64_t c = 0; c < size.cols; ++c) weight.set(size.rows / 2, c, 0.5);  // a row without a span
    weight.set(0, size.cols - 1, 37.0);
    check<T, 128, false>(weight, random);
    check<T, 64, true>(weight, random);
    if (size.rows < 20) check<T, 128, true>(weight, random);
    if (size.rows < 20) check<T, 64, false>(weight, random);
  }
}

SIMT_TEST(quantize_pack_equals_the_cpu) {
  Random random(23);
  check_all<cuda::BFloat16>(DType::kBFloat16, random);
  check_all<__half>(DType::kFloat16, random);
  check_all<float>(DType::kFloat32, random);
}

}  // namespace
}  // namespace sglang_er::simt
