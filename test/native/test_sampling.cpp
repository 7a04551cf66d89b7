// sample_rows and softmax_rows against plain loops in double.
#include <algorithm>

#include "sampling_op.h"
#include "testing.h"

namespace sglang_er::cpu {
namespace {

constexpr int64_t kSizes[] = {1, 2, 7, 31, 33, 511, 512, 513, 1025, 16'385, 20'001};

// [rows, width, size] in an exact buffer with gaps.
struct Cube {
  Matrix values;  // [rows * width, size]
  int64_t width;
  Weights view() const { return {values.as<float>(), width * values.stride, width, values.stride}; }
  double at(int64_t row, int64_t offset, int64_t i) const { return values.at(row * width + offset, i); }
};

// Many orders of magnitude, half of them zero, no row without weight.
Cube sparse(Random& random, int64_t rows, int64_t width, int64_t size, int64_t gap) {
  Cube made{Matrix(DType::kFloat32, rows * width, size, gap), width};
  for (int64_t r = 0; r < rows * width; ++r) {
    for (int64_t i = 0; i < size; ++i)
      made.values.set(r, i, uniform(random) < 0.5 ? 0.0 : std::exp(6 * normal(random)));
    made.values.set(r, size / 2, 1.0);
  }
  return made;
}

// The interval of the drawn index holds the coin.
void check_drawn(const std::vector<double>& weights, double coin, int64_t drawn) {
  const int64_t size = static_cast<int64_t>(weights.size());
  CHECK(drawn >= 0 && drawn < size && weights[drawn] > 0.0);
  double total = 0.0, before = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    total += weights[i];
    if (i < drawn) before += weights[i];
  }
  const double slack = 0x1p-40 * total;
  CHECK(coin * total < before + weights[drawn] + slack && coin * total >= before - slack);
}

TEST(sample_rows_draws_the_coins_index) {
  Random random(6);
  int i = 0;
  for (int64_t size : kSizes) {
    for (int64_t rows : {1, 9}) {
      ++i;
      const int64_t width = 1 + i % 3, subtracted = i % 4 == 0 ? 0 : std::max<int64_t>(width - 1, 1);
      const Cube p = sparse(random, rows, width, size, i % 2 * 3),
                 q = sparse(random, rows, subtracted, size, i % 3);
      Exact<int64_t> offsets(rows), out(rows, -1);
      Exact<double> coins(rows);
      for (int64_t r = 0; r < rows; ++r) offsets[r] = r % width, coins[r] = uniform(random);
      coins[0] = i % 2 == 0 ? 0.0 : 1 - 0x1p-53;
      const bool has_offsets = width > 1;
      sample_rows({p.view(), subtracted > 0 ? q.view() : Weights{}, has_offsets ? offsets.data() : nullptr,
                   coins.data(), rows, size, out.data(), 1 + i % 3});
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> plain(size), residual(size);
        double left = 0.0;
        for (int64_t k = 0; k < size; ++k) {
          plain[k] = p.at(r, offsets[r], k);
          residual[k] = offsets[r] < subtracted ? std::max(plain[k] - q.at(r, offsets[r], k), 0.0) : plain[k];
          left += residual[k];
        }
        check_drawn(left > 0.0 ? residual : plain, coins[r], out[r]);
      }
    }
  }
}

TEST(softmax_rows_equals_loops) {
  Random random(7);
  int i = 0;
  for (int64_t size : kSizes) {
    for (int64_t rows : {1, 2, 5}) {
      ++i;
      const DType type = kDTypes[i % 3];
      Matrix logits = Matrix::random(random, type, rows, size, i % 2 * 5);
      for (int64_t k = 1; k < size; k += 5) logits.set(0, k, -std::numeric_limits<double>::infinity());
      if (rows > 1) logits.set(1, size - 1, i % 2 == 0 ? kNaN : -kNaN);
      if (rows > 2) logits.set(2, size / 2, std::numeric_limits<double>::infinity());
      Exact<float> temperatures(rows, 1.0f);
      for (int64_t r = 1; r < rows; ++r) temperatures[r] = static_cast<float>(0.3 + uniform(random));
      const Matrix out(DType::kFloat32, rows, size, i % 3 * 2);
      softmax_rows({logits.data(), logits.stride, type, temperatures.data(), rows, size, out.as<float>(),
                    out.stride, 1 + i % 3});
      for (int64_t r = 0; r < rows; ++r) {
        double sum = 0.0, largest = -std::numeric_limits<double>::infinity();
        for (int64_t k = 0; k < size; ++k) largest = std::max(largest, logits.at(r, k));
        for (int64_t k = 0; k < size; ++k) sum += std::exp((logits.at(r, k) - largest) / temperatures[r]);
        for (int64_t k = 0; k < size; ++k) {
          const double expected = std::exp((logits.at(r, k) - largest) / temperatures[r]) / sum;
          if (r == 1 || r == 2) {
            CHECK(std::isnan(out.at(r, k)));
          } else {
            CHECK_NEAR(out.at(r, k), expected, 1e-5 * expected + 1e-37);
          }
        }
      }
      CHECK(out.gaps_are_untouched());
    }
  }
}

}  // namespace
}  // namespace sglang_er::cpu
