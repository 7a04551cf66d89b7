// The CUDA kernel w4a8_linear, its warps run lane by lane over the functions that it is made of, in the
// kernel's order, against plain loops in double.
#include "sglang_er/w4a8_fragment.h"
#include "w4_block.h"

namespace sglang_er::cpu {
namespace {

int8_t byte_of(uint32_t word, int byte) { return static_cast<int8_t>(word >> 8 * byte); }

// mma.sync.m16n8k32 of int8.
void multiply_add(int (&c)[mma::kLanes][w4::kProducts][4], int p, const mma::FragmentA (&a)[mma::kLanes],
                  const mma::FragmentB (&b)[mma::kLanes]) {
  int left[mma::kRows][mma::kByteDepth], right[mma::kByteDepth][mma::kCols];
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    for (int byte = 0; byte < 4; ++byte) {
      for (int reg = 0; reg < 4; ++reg)
        left[mma::a_row(lane, reg)][mma::a_byte_depth(lane, reg, byte)] = byte_of(a[lane].reg[reg], byte);
      for (int reg = 0; reg < 2; ++reg)
        right[mma::b_byte_depth(lane, reg, byte)][mma::b_col(lane)] = byte_of(b[lane].reg[reg], byte);
    }
  }
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      for (int k = 0; k < mma::kByteDepth; ++k)
        c[lane][p][reg] += left[mma::c_row(lane, reg)][k] * right[k][mma::c_col(lane, reg)];
    }
  }
}

// A row's group of x after its warp has quantized it.
struct Quantized {
  uint8_t levels[w4a8::kGroup];
  w4a8::RowNumbers numbers;
};

Quantized quantize(const Matrix& x, int64_t row, int64_t group) {
  Quantized made;
  float values[mma::kLanes][w4a8::kLaneLevels];
  uint32_t top = 0;
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    for (int c = 0; c < w4a8::kLaneLevels; ++c) {
      const int64_t input = group * w4::kGroup + w4a8::first_input(lane, c % 2) + c / 2;
      values[lane][c] = input < x.cols ? static_cast<float>(x.at(row, input)) : 0.0f;
      top = std::max(top, std::bit_cast<uint32_t>(values[lane][c]) & 0x7FFFFFFFu);
    }
  }
  const bool finite = w4a8::is_finite(top);
  const w4a8::Quantizer quantizer = w4a8::quantizer(std::bit_cast<float>(top));
  int sum = 0;
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    int levels[w4a8::kLaneLevels];
    for (int c = 0; c < w4a8::kLaneLevels; ++c) {
      levels[c] = finite ? w4a8::level(values[lane][c], quantizer.inverse) : 0;
      sum += levels[c];
    }
    const uint32_t word = w4a8::pack_levels(levels);
    std::memcpy(&made.levels[lane * w4a8::kLaneLevels], &word, sizeof(word));
  }
  const float scale = finite ? quantizer.scale : static_cast<float>(kNaN);
  made.numbers = {scale, scale * static_cast<float>(sum)};
  return made;
}

std::vector<float> linear(const Matrix& x, const Packed& packed) {
  return linear_by_blocks(
      packed, x.rows, [&](const int64_t (&blocks)[2], int64_t first_row, int64_t group, WarpSums& totals) {
        Quantized rows[mma::kCols] = {};
        for (int row = 0; row < mma::kCols && first_row + row < x.rows; ++row)
          rows[row] = quantize(x, first_row + row, group);
        int c[mma::kLanes][w4::kProducts][4] = {};
        for (int jb = 0; jb < w4::kWordSteps; ++jb) {
          uint32_t words[mma::kLanes][w4::kLaneRows];
          load_words(packed, blocks, group, jb, words);
          mma::FragmentB b[mma::kLanes];
          for (int lane = 0; lane < mma::kLanes; ++lane) {
            // ldmatrix.x4 of the even word step and the next one.
            uint32_t loaded[4];
            for (int i = 0; i < 4; ++i)
              std::memcpy(&loaded[i],
                          &rows[mma::loaded_row(lane)]
                               .levels[w4a8::matrix_byte(i, jb / 2 * 2) + 2 * mma::loaded_col(lane, 0)],
                          4);
            b[lane] = w4a8::input_fragment(loaded, jb % 2);
          }
          for (int p = 0; p < w4::kProducts; ++p) {
            mma::FragmentA a[mma::kLanes];
            for (int lane = 0; lane < mma::kLanes; ++lane) a[lane] = w4a8::weight_fragment(words[lane], p);
            multiply_add(c, p, a, b);
          }
        }
        fold_group(packed, blocks, group, totals,
                   [&](float total, int lane, int p, int reg, float scale, float zero) {
                     return w4a8::fold(total, c[lane][p][reg], rows[mma::c_col(lane, reg)].numbers, scale,
                                       zero);
                   });
      });
}

// x rounded as w4a8_fragment.h says, in one go.
struct Rounded {
  double value;
  bool finite;
};
Rounded rounded(const Matrix& x, int64_t row, int64_t k) {
  const int64_t begin = k / w4::kGroup * w4::kGroup;
  float top = 0x1p-110f;
  bool finite = true;
  for (int64_t i = begin; i < std::min<int64_t>(begin + w4::kGroup, x.cols); ++i) {
    const auto value = static_cast<float>(x.at(row, i));
    finite = finite && std::isfinite(value);
    top = std::max(top, std::abs(value));
  }
  const float scale = top / 127.0f, inverse = 127.0f / top;
  return {scale * static_cast<double>(std::nearbyint(static_cast<float>(x.at(row, k)) * inverse)), finite};
}

void check(const Matrix& x, const Packed& packed) {
  const std::vector<float> out = linear(x, packed);
  for (int64_t m = 0; m < x.rows; ++m) {
    bool finite = true;
    for (int64_t k = 0; k < x.cols; ++k) finite = finite && rounded(x, m, k).finite;
    for (int64_t n = 0; n < packed.shape.rows; ++n) {
      const float found = out[static_cast<size_t>(m * packed.shape.rows + n)];
      if (!finite) {
        CHECK(std::isnan(found));
        continue;
      }
      double sum = 0.0, terms = 0.0;
      for (int64_t k = 0; k < x.cols; ++k) {
        const double value = rounded(x, m, k).value;
        sum += value * packed.value(n, k);
        terms += std::abs(value) * packed.magnitude(n, k);
      }
      CHECK_NEAR(found, sum, 0x1p-20 * terms);
    }
  }
}

TEST(w4a8_fragments_multiply_like_loops) {
  Random random(13);
  int i = 0;
  for (const LinearShape& shape : kLinearShapes) {
    const Packed packed = pack(Matrix::random(random, kDTypes[i % 3], shape.n, shape.k), w4::kGroup, 1);
    const DType type = i % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
    check(Matrix::random(random, type, shape.m, shape.k, i++ % 2 * 3), packed);
  }
}

TEST(w4a8_rows_that_are_not_finite_are_nan_and_alone) {
  Random random(14);
  const Packed packed = pack(Matrix::random(random, DType::kBFloat16, 40, 300), w4::kGroup, 1);
  Matrix x = Matrix::random(random, DType::kBFloat16, 9, 300);
  x.set(2, 17, kNaN);
  x.set(8, 290, -std::numeric_limits<double>::infinity());
  for (int64_t k = 0; k < 300; ++k) {
    x.set(4, k, 0.0);
    x.set(5, k, k == 3 ? 1e-38 : 0.0);
    x.set(6, k, k == 140 ? 1e36 : x.at(6, k));
  }
  check(x, packed);
}

TEST(w4a8_levels_lie_where_their_nibbles_are) {
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    for (int c = 0; c < w4a8::kLaneLevels; ++c) {
      const int place = lane * w4a8::kLaneLevels + c, nibble = place / w4a8::kHalf;
      const int word = place % w4a8::kHalf / 4, shift = 8 * c + 4 * nibble;
      CHECK(w4a8::first_input(lane, c % 2) + c / 2 ==
            nibble_input(w4::kGroup, word, shift / 16, shift % 16 / 4));
    }
  }
}

}  // namespace
}  // namespace sglang_er::cpu
