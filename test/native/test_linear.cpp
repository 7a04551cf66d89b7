// Linear ops, quantize_pack and dequantize against plain loops in double.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "bf16_linear_op.h"
#include "dequantize_op.h"
#include "isa.h"
#include "packed.h"
#include "sglang_er/clip_search.h"
#include "testing.h"
#include "w4a16_linear_op.h"
#include "w4a8_linear_op.h"

namespace sglang_er::cpu {
namespace {

struct Shape {
  int64_t m, n, k;
};
// One row, one column, K below a register, more rows than a pass, enough bytes for several threads.
constexpr Shape kShapes[] = {{1, 1, 1},    {1, 1, 600},   {4, 300, 1},  {9, 16, 129},   {2, 15, 7},
                             {5, 5, 15},   {1, 17, 31},   {3, 33, 200}, {17, 130, 333}, {7, 63, 64},
                             {130, 18, 5}, {1, 257, 896}, {8, 66, 130}, {300, 35, 40},  {33, 129, 1100}};

struct Problem {
  Matrix x, bias, out;
  bool has_bias;
  int threads;
};

// Types, gaps, bias and threads vary with the counter.
Problem problem(Random& random, Shape shape, int i) {
  const DType x_type = kDTypes[i % 3], bias_type = kDTypes[i / 2 % 3], out_type = kDTypes[i / 3 % 3];
  return {Matrix::random(random, x_type, shape.m, shape.k, i % 2 * 5),
          Matrix::random(random, bias_type, 1, shape.n),
          Matrix(out_type, shape.m, shape.n, i % 4 == 1 ? 3 : 0), i % 3 != 0, 1 + i % 3};
}

// x(m, k) and magnitude(n, k) say what the kernel multiplies and how large its terms are; an error of
// `accumulation` relative to the sum of these is allowed, and one rounding of the result.
void check_product(const Problem& p, int64_t n_count, const std::function<double(int64_t, int64_t)>& x,
                   const std::function<double(int64_t, int64_t)>& weight,
                   const std::function<double(int64_t, int64_t)>& magnitude, double accumulation) {
  for (int64_t m = 0; m < p.x.rows; ++m) {
    std::vector<double> row(static_cast<size_t>(p.x.cols));
    for (int64_t k = 0; k < p.x.cols; ++k) row[k] = x(m, k);
    for (int64_t n = 0; n < n_count; ++n) {
      const double bias = p.has_bias ? p.bias.at(0, n) : 0.0;
      double sum = bias, terms = std::abs(bias);
      for (int64_t k = 0; k < p.x.cols; ++k) {
        sum += row[k] * weight(n, k);
        terms += std::abs(row[k]) * magnitude(n, k);
      }
      const double bound = accumulation * terms + rounding(p.out.type) * std::abs(sum) + denormal(p.out.type);
      CHECK_NEAR(p.out.at(m, n), sum, bound);
    }
  }
  CHECK(p.out.gaps_are_untouched());
}

W4LinearCall w4_call(const Problem& p, const Packed& packed) {
  return {.x = p.x.data(),
          .x_stride = p.x.stride,
          .x_type = p.x.type,
          .m = p.x.rows,
          .packed = packed.packed.data(),
          .scales_zeros = packed.scales_zeros.data(),
          .shape = packed.shape,
          .bias = p.has_bias ? p.bias.data() : nullptr,
          .bias_type = p.bias.type,
          .out = p.out.data(),
          .out_stride = p.out.stride,
          .out_type = p.out.type,
          .threads = p.threads};
}

// The code of a row's group, as the headers have it.
GroupCode rule(const Matrix& weight, int64_t n, int64_t begin, int64_t end, bool clip_search) {
  float lo = std::numeric_limits<float>::infinity(), hi = -lo;
  for (int64_t k = begin; k < end; ++k) {
    lo = std::min(lo, static_cast<float>(weight.at(n, k)));
    hi = std::max(hi, static_cast<float>(weight.at(n, k)));
  }
  const GroupCode whole = group_code(lo, hi);
  clip::Search search = clip::begin(lo, hi, whole);
  for (int i = 0; clip_search && i < clip::kCandidates; ++i) {
    const clip::Candidate candidate = clip::candidate(search, i);
    uint32_t squares = 0;
    for (int64_t k = end; k-- > begin;)
      squares +=
          clip::square(clip::error(clip::units(static_cast<float>(weight.at(n, k)), whole), candidate));
    clip::compare(search, i, candidate, squares);
  }
  return search.best;
}

TEST(quantize_pack_is_the_rule_bit_for_bit) {
  Random random(1);
  int i = 0, cut = 0;
  for (int group : {32, 64, 96, 128, 1024}) {
    for (Shape shape : kShapes) {
      ++i;
      const Matrix weight = Matrix::random(random, kDTypes[i % 3], shape.n, shape.k, i % 2 * 3);
      const bool clip_search = i % 4 > 1;
      const Packed packed = pack(weight, group, 1 + i % 3, clip_search);
      const PackedShape& s = packed.shape;
      for (int64_t n = 0; n < s.row_blocks() * kRowBlock; ++n) {
        for (int64_t g = 0; g < s.groups(); ++g) {
          const int64_t begin = g * group, end = std::min(begin + group, shape.k);
          GroupCode code{};
          if (n < shape.n) {
            code = rule(weight, n, begin, end, clip_search);
            cut += code.scale_bits != rule(weight, n, begin, end, false).scale_bits;
          }
          CHECK(packed.meta(n, g, 0) == code.scale_bits && packed.meta(n, g, 1) == code.zero_bits);
          for (int64_t k = begin; k < begin + group; ++k) {
            const bool inside = n < shape.n && k < end;
            const int level = inside ? quantize_value(static_cast<float>(weight.at(n, k)), code) : 0;
            CHECK(packed.level(n, k) == level);
          }
        }
      }
    }
  }
  CHECK(cut > 0);
}

TEST(dequantize_is_exact) {
  Random random(2);
  int i = 0;
  for (Shape shape : kShapes) {
    ++i;
    const Packed packed = pack(Matrix::random(random, DType::kFloat32, shape.n, shape.k), 64, 1);
    const Matrix out(DType::kFloat32, shape.n, shape.k, i % 2 * 3);
    dequantize({packed.packed.data(), packed.scales_zeros.data(), packed.shape, out.as<float>(), out.stride,
                1 + i % 3});
    for (int64_t n = 0; n < shape.n; ++n) {
      for (int64_t k = 0; k < shape.k; ++k)
        CHECK_NEAR(out.at(n, k), packed.value(n, k), 0x1p-22 * packed.magnitude(n, k));
    }
    CHECK(out.gaps_are_untouched());
  }
}

TEST(w4a16_linear_equals_loops) {
  Random random(3);
  int i = 0;
  for (int group : {32, 64, 1024}) {
    for (Shape shape : kShapes) {
      const Packed packed = pack(Matrix::random(random, kDTypes[i % 3], shape.n, shape.k), group, 1);
      const Problem p = problem(random, shape, i++);
      w4a16_linear(w4_call(p, packed));
      check_product(
          p, shape.n, [&](int64_t m, int64_t k) { return p.x.at(m, k); },
          [&](int64_t n, int64_t k) { return packed.value(n, k); },
          [&](int64_t n, int64_t k) { return packed.magnitude(n, k); }, 0x1p-19);
    }
  }
}

TEST(w4a8_linear_equals_loops) {
  Random random(4);
  int i = 0;
  for (int group : {32, 128, 1024}) {
    for (Shape shape : kShapes) {
      const Packed packed = pack(Matrix::random(random, kDTypes[i % 3], shape.n, shape.k), group, 1);
      const Problem p = problem(random, shape, i++);
      w4a8_linear(w4_call(p, packed));
      Matrix rounded(DType::kFloat32, shape.m, shape.k);
      for (int64_t m = 0; m < shape.m; ++m) {
        for (int64_t begin = 0; begin < shape.k; begin += group) {
          const int64_t end = std::min<int64_t>(begin + group, shape.k);
          float largest = 0x1p-110f;
          for (int64_t k = begin; k < end; ++k)
            largest = std::max(largest, std::abs(static_cast<float>(p.x.at(m, k))));
          const float inverse = 127.0f / largest;
          for (int64_t k = begin; k < end; ++k)
            rounded.set(m, k,
                        double{std::nearbyint(static_cast<float>(p.x.at(m, k)) * inverse)} *
                            double{largest / 127.0f});
        }
      }
      check_product(
          p, shape.n, [&](int64_t m, int64_t k) { return rounded.at(m, k); },
          [&](int64_t n, int64_t k) { return packed.value(n, k); },
          [&](int64_t n, int64_t k) { return packed.magnitude(n, k); }, 0x1p-21);
    }
  }
}

TEST(bf16_linear_equals_loops) {
  Random random(5);
  int i = 0;
  for (DType type : kDTypes) {
    for (Shape shape : kShapes) {
      const Matrix weight = Matrix::random(random, type, shape.n, shape.k, i % 2 * 7);
      const Problem p = problem(random, shape, i++);
      bf16_linear({.x = p.x.data(),
                   .x_stride = p.x.stride,
                   .x_type = p.x.type,
                   .m = shape.m,
                   .weight = weight.data(),
                   .weight_stride = weight.stride,
                   .weight_type = type,
                   .n = shape.n,
                   .k = shape.k,
                   .bias = p.has_bias ? p.bias.data() : nullptr,
                   .bias_type = p.bias.type,
                   .out = p.out.data(),
                   .out_stride = p.out.stride,
                   .out_type = p.out.type,
                   .threads = p.threads});
      const auto value = [&](int64_t n, int64_t k) { return weight.at(n, k); };
      const bool rounds_x = multiplies_bf16(active_isa()) && type == DType::kBFloat16;
      const int lanes = rounds_x && active_isa() == Isa::kAmx ? 1 : 16;
      check_product(
          p, shape.n,
          [&](int64_t m, int64_t k) {
            const double x = p.x.at(m, k);
            return rounds_x ? double{bf16_to_float(float_to_bf16(static_cast<float>(x)))} : x;
          },
          value, [&](int64_t n, int64_t k) { return std::abs(value(n, k)); },
          (static_cast<double>(shape.k) / lanes + 6) * 0x1p-23);
    }
  }
}

// Loads of tiles are not sanitized: a page that nobody may read follows W.
TEST(bf16_linear_reads_nothing_behind_the_weight) {
  const int64_t page = sysconf(_SC_PAGESIZE), n = 35, k = 100, bytes = n * k * 2;
  const int64_t readable = (bytes + page - 1) / page * page;
  char* pages = static_cast<char*>(
      mmap(nullptr, readable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  CHECK(pages != MAP_FAILED && mprotect(pages + readable, page, PROT_NONE) == 0);
  const Exact<float> x(70 * k, 1.0f), out(70 * n, 0.0f);
  for (int64_t m : {1, 17, 70}) {
    bf16_linear({.x = x.data(),
                 .x_stride = k,
                 .x_type = DType::kFloat32,
                 .m = m,
                 .weight = pages + readable - bytes,
                 .weight_stride = k,
                 .weight_type = DType::kBFloat16,
                 .n = n,
                 .k = k,
                 .bias = nullptr,
                 .bias_type = DType::kFloat32,
                 .out = out.data(),
                 .out_stride = n,
                 .out_type = DType::kFloat32,
                 .threads = 2});
  }
  munmap(pages, readable + page);
}

}  // namespace
}  // namespace sglang_er::cpu
