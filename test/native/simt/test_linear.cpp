// w4a16_linear and w4a8_linear, their kernels whole, against plain loops in double: every width of a block,
// splits, chunks of rows, rows of x and out that are not aligned, outputs and weights of exactly their size.
#include "packed.h"
#include "w4a16_linear_kernel.h"
#include "w4a8_linear_kernel.h"

namespace sglang_er::simt {
namespace {

using namespace cpu;
using namespace cuda;

struct Case {
  int64_t m, n, k;
  int gap = 0;     // between rows of x and of out; both begin off their alignment then
  char bias = 0;   // h: of x's type, f: fp32
  int splits = 0;  // 0: as the kernel cuts
};

// Buffers of a call, the outputs NaN.
struct Call {
  const Case& of;
  Packed packed;
  Matrix x, out;
  std::vector<float> bias;
  Exact<uint16_t> half_bias;
  w4::Schedule schedule;
  Exact<float> partials;
  Exact<uint32_t> counters;

  Call(const Case& of, DType type, Random& random)
      : of(of),
        packed(pack(Matrix::random(random, DType::kBFloat16, of.n, of.k), w4::kGroup, 1)),
        x(Matrix::random(random, type, of.m, of.k, of.gap)),
        out(type, of.m, of.n, of.gap),
        half_bias(of.n),
        schedule(cut(of)),
        partials(int64_t{schedule.tiles} * chunks() * schedule.splits * w4::kTileRows * kMostRows, NAN),
        counters(int64_t{schedule.tiles} * chunks()) {
    const Matrix drawn = Matrix::random(random, type, 1, of.n);
    for (int64_t i = 0; i < of.n; ++i) {
      bias.push_back(static_cast<float>(drawn.at(0, i)));
      half_bias[i] = drawn.as<uint16_t>()[i];
    }
  }

  static w4::Schedule cut(const Case& of) {
    w4::Schedule made = w4::schedule(of.n, of.k);
    if (of.splits == 0) return made;
    const int groups = static_cast<int>((of.k + w4::kGroup - 1) / w4::kGroup);
    const int each = (groups + of.splits - 1) / of.splits;
    made.split_groups = (each + 1) / 2 * 2;
    made.splits = (groups + made.split_groups - 1) / made.split_groups;
    return made;
  }

  int chunks() const { return static_cast<int>((of.m + kMostRows - 1) / kMostRows); }
  dim3 grid() const {
    return {static_cast<unsigned>(chunks()), static_cast<unsigned>(schedule.tiles),
            static_cast<unsigned>(schedule.splits)};
  }
  int col_tiles() const { return of.m <= 8 ? 1 : of.m <= 16 ? 2 : of.m <= 32 ? 4 : 8; }

  W4LinearParams params() {
    return {.m = static_cast<int>(of.m),
            .packed = packed.packed.data(),
            .scales_zeros = packed.scales_zeros.data(),
            .shape = packed.shape,
            .schedule = schedule,
            .bias = of.bias == 'f'   ? static_cast<const void*>(bias.data())
                    : of.bias == 'h' ? half_bias.data()
                                     : nullptr,
            .bias_is_float = of.bias == 'f',
            .out = out.as<uint16_t>(),
            .out_stride = out.stride,
            .out_aligned = of.gap == 0 && of.n % 4 == 0,
            .partials = reinterpret_cast<float4*>(partials.data()),
            .counters = counters.data()};
  }

  // value(m, k): what x counts as. A row that is not finite gives none that is.
  template <class Value>
  void check(const Value& value) const {
    for (int64_t m = 0; m < of.m; ++m) {
      bool finite = true;
      for (int64_t k = 0; k < of.k; ++k) finite = finite && std::isfinite(x.at(m, k));
      for (int64_t n = 0; n < of.n; ++n) {
        if (!finite) {
          CHECK(!std::isfinite(out.at(m, n)));
          continue;
        }
        double sum = of.bias == 0 ? 0.0 : bias[static_cast<size_t>(n)], terms = 0.0;
        for (int64_t k = 0; k < of.k; ++k) {
          sum += value(m, k) * packed.value(n, k);
          terms += std::abs(value(m, k)) * packed.magnitude(n, k);
        }
        CHECK_NEAR(out.at(m, n), sum,
                   0x1p-19 * terms + rounding(out.type) * std::abs(sum) + denormal(out.type));
      }
    }
    CHECK(out.gaps_are_untouched());
    for (int64_t i = 0; i < counters.size(); ++i) CHECK(counters[i] == 0);
  }
};

template <class Run>
void by_width(const Call& call, const Run& run) {
  switch (call.col_tiles()) {
    case 1:
      return run.template operator()<1>();
    case 2:
      return run.template operator()<2>();
    case 4:
      return run.template operator()<4>();
    default:
      return run.template operator()<8>();
  }
}

template <bool IsHalf>
void run_w4a16(Call& call, Random& random) {
  // What the launch before makes: x, which is not to be read before it is over.
  const Matrix& made = call.x;
  Matrix x = Matrix(made.type, made.rows, made.cols, call.of.gap);
  const W4A16LinearParams params{.linear = call.params(),
                                 .x = x.as<uint16_t>(),
                                 .x_stride = x.stride,
                                 .x_aligned = call.of.gap == 0 && x.stride % 8 == 0};
  const auto before = [&] {
    for (int64_t m = 0; m < x.rows; ++m)
      std::memcpy(x.as<uint16_t>() + m * x.stride, made.as<uint16_t>() + m * made.stride, x.cols * 2);
  };
  by_width(call, [&]<int ColTiles>() {
    launch(w4a16_linear_kernel<IsHalf, ColTiles>, call.grid(), kTileThreads, random, params, memory,
           kSharedBytes, before);
  });
}

template <bool IsHalf>
void run_w4a8(Call& call, Random& random) {
  const int64_t groups = (call.of.k + kStepInputs - 1) / kStepInputs * w4::kPhases,
                items = call.of.m * groups;
  Exact<uint4> levels(items * w4::kGroup / 16), made_levels(items * w4::kGroup / 16);
  Exact<float4> numbers(items / 2), made_numbers(items / 2);  // 16 bytes each: alignment
  const QuantizedRows made{reinterpret_cast<uint8_t*>(made_levels.data()),
                           reinterpret_cast<w4a8::RowNumbers*>(made_numbers.data()),
                           static_cast<int>(groups)};
  const QuantizeRowsParams quantize{
      .x = call.x.as<uint16_t>(), .x_stride = call.x.stride, .cols = call.x.cols, .to = made};
  constexpr int kWarps = kQuantizeThreads / mma::kLanes;
  launch(quantize_rows_kernel<IsHalf>,
         dim3{static_cast<unsigned>((groups + kWarps - 1) / kWarps), static_cast<unsigned>(call.of.m)},
         kQuantizeThreads, random, quantize, memory, kSharedBytes);
  const QuantizedRows rows{reinterpret_cast<uint8_t*>(levels.data()),
                           reinterpret_cast<w4a8::RowNumbers*>(numbers.data()), static_cast<int>(groups)};
  const W4A8LinearParams params{.linear = call.params(), .x = rows};
  const auto before = [&] {
    std::memcpy(levels.data(), made_levels.data(), static_cast<size_t>(items * w4::kGroup));
    std::memcpy(numbers.data(), made_numbers.data(), static_cast<size_t>(items * 8));
  };
  by_width(call, [&]<int ColTiles>() {
    launch(w4a8_linear_kernel<IsHalf, ColTiles>, call.grid(), kTileThreads, random, params, memory,
           kSharedBytes, before);
  });
}

// As the kernel cuts K, blocks have few steps; with one or two splits they go round the ring of stages.
constexpr Case kCases[] = {{1, 16, 128},
                           {3, 129, 1000, 0, 'h'},
                           {8, 130, 2300, 3, 'f'},
                           {9, 20, 1300},
                           {16, 260, 300, 1, 'h'},
                           {17, 136, 900, 0, 'f', 2},
                           {32, 128, 2048, 0, 0, 3},
                           {33, 64, 520},
                           {64, 132, 1100, 5, 'h', 2},
                           {70, 140, 700, 0, 'f', 2},
                           {129, 36, 384},
                           {5, 16, 20, 2},
                           {7, 40, 3300, 0, 0, 1},
                           {12, 20, 5000, 0, 'f', 2},
                           {20, 16, 2700, 4, 0, 1},
                           {50, 24, 2300, 0, 0, 1}};

void check_w4a16(Call& call, Random& random) {
  call.x.type == DType::kFloat16 ? run_w4a16<true>(call, random) : run_w4a16<false>(call, random);
  call.check([&](int64_t m, int64_t k) { return call.x.at(m, k); });
}

void check_w4a8(Call& call, Random& random) {
  call.x.type == DType::kFloat16 ? run_w4a8<true>(call, random) : run_w4a8<false>(call, random);
  // x rounded in groups, as w4a8_fragment.h says.
  Matrix rounded(DType::kFloat32, call.of.m, call.of.k);
  for (int64_t m = 0; m < call.of.m; ++m) {
    for (int64_t begin = 0; begin < call.of.k; begin += w4::kGroup) {
      const int64_t end = std::min<int64_t>(begin + w4::kGroup, call.of.k);
      const auto at = [&](int64_t k) { return static_cast<float>(call.x.at(m, k)); };
      float top = 0x1p-110f;
      for (int64_t k = begin; k < end; ++k) top = std::max(top, std::abs(at(k)));
      for (int64_t k = begin; k < end; ++k)
        rounded.set(m, k, std::nearbyint(at(k) * (127.0f / top)) * (top / 127.0f));
    }
  }
  call.check([&](int64_t m, int64_t k) { return rounded.at(m, k); });
}

void check_cases(uint64_t seed, void (*check)(Call&, Random&)) {
  Random random(seed);
  int i = 0;
  for (const Case& of : kCases) {
    Call call(of, i++ % 2 == 0 ? DType::kBFloat16 : DType::kFloat16, random);
    check(call, random);
  }
}
SIMT_TEST(w4a16_linear_equals_loops) { check_cases(21, check_w4a16); }
SIMT_TEST(w4a8_linear_equals_loops) { check_cases(22, check_w4a8); }

// Rows of zeros, of hardly anything and of large numbers; those that are not finite spoil no other.
SIMT_TEST(linear_takes_any_x) {
  Random random(24);
  const Case of{9, 40, 300};
  for (const bool int8 : {false, true}) {
    Call call(of, DType::kBFloat16, random);
    Matrix& x = call.x;
    x.set(2, 17, kNaN);
    x.set(8, 290, -std::numeric_limits<double>::infinity());
    for (int64_t k = 0; k < of.k; ++k) {
      x.set(4, k, 0.0);
      x.set(5, k, k == 3 ? 1e-38 : 0.0);
    }
    x.set(6, 140, 1e36);
    int8 ? check_w4a8(call, random) : check_w4a16(call, random);
  }
}

}  // namespace
}  // namespace sglang_er::simt
