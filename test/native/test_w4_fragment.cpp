// The CUDA kernels w4a16_linear and quantize_pack, their warps run lane by lane over the functions that they
// are made of, in the kernels' order, against plain loops in double.
#include "sglang_er/quantize_lane.h"
#include "w4_block.h"

namespace sglang_er::cpu {
namespace {

template <bool IsHalf>
double element(uint32_t pair, int half) {
  return w4::input_value<IsHalf>(static_cast<uint16_t>(pair >> 16 * half));
}

// mma.sync.m16n8k16 with fp32 sums.
template <bool IsHalf>
void multiply_add(float (&c)[mma::kLanes][w4::kProducts][4], int p, const mma::FragmentA (&a)[mma::kLanes],
                  const mma::FragmentB (&b)[mma::kLanes]) {
  double left[mma::kRows][mma::kDepth], right[mma::kDepth][mma::kCols];
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    for (int half = 0; half < 2; ++half) {
      for (int reg = 0; reg < 4; ++reg)
        left[mma::a_row(lane, reg)][mma::a_depth(lane, reg, half)] = element<IsHalf>(a[lane].reg[reg], half);
      for (int reg = 0; reg < 2; ++reg)
        right[mma::b_depth(lane, reg, half)][mma::b_col(lane)] = element<IsHalf>(b[lane].reg[reg], half);
    }
  }
  for (int lane = 0; lane < mma::kLanes; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      double sum = c[lane][p][reg];
      for (int k = 0; k < mma::kDepth; ++k)
        sum += left[mma::c_row(lane, reg)][k] * right[k][mma::c_col(lane, reg)];
      c[lane][p][reg] = static_cast<float>(sum);
    }
  }
}

// x as it lies in shared memory: a group of 8 rows, zero where there is none.
struct Staged {
  uint16_t x[mma::kCols][w4::kGroup] = {};

  Staged(const Matrix& from, int64_t first_row, int64_t group) {
    for (int row = 0; row < mma::kCols && first_row + row < from.rows; ++row) {
      for (int64_t i = 0; i < w4::kGroup && group * w4::kGroup + i < from.cols; ++i)
        x[row][i] = from.as<uint16_t>()[(first_row + row) * from.stride + group * w4::kGroup + i];
    }
  }

  // ldmatrix.x4 of a word step: what every lane gets.
  void load(int jb, uint32_t (&loaded)[mma::kLanes][4]) const {
    const uint16_t* rows[4][8];
    for (int lane = 0; lane < mma::kLanes; ++lane)
      rows[mma::address_matrix(lane)][mma::address_row(lane)] =
          &x[mma::address_row(lane)][w4::matrix_input(mma::address_matrix(lane), jb)];
    for (int lane = 0; lane < mma::kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const uint16_t* row = rows[i][mma::loaded_row(lane)];
        loaded[lane][i] = row[mma::loaded_col(lane, 0)] | uint32_t{row[mma::loaded_col(lane, 1)]} << 16;
      }
    }
  }

  template <bool IsHalf, int Pieces>
  float sum(int row) const {
    constexpr int kSharing = w4::kPieces / Pieces;
    float lanes[kSharing];
    for (int lane = 0; lane < kSharing; ++lane) {
      float pieces[Pieces];
      for (int i = 0; i < Pieces; ++i) {
        uint32_t words[4];
        std::memcpy(words, &x[row][(lane + i * kSharing) * 8], sizeof(words));
        pieces[i] = w4::piece_sum<IsHalf>(words);
      }
      lanes[lane] = w4::lane_sum(pieces);
    }
    for (int apart = kSharing / 2; apart > 0; apart /= 2) {
      for (int lane = 0; lane < apart; ++lane) lanes[lane] += lanes[lane + apart];
    }
    return lanes[0];
  }
};

// totals += a group of two blocks of rows.
template <bool IsHalf>
void multiply_group(const Packed& packed, const int64_t (&blocks)[2], int64_t group, const Staged& staged,
                    WarpSums& totals) {
  float c[mma::kLanes][w4::kProducts][4] = {}, sums[mma::kCols];
  for (int jb = 0; jb < w4::kWordSteps; ++jb) {
    uint32_t loaded[mma::kLanes][4], words[mma::kLanes][w4::kLaneRows];
    staged.load(jb, loaded);
    load_words(packed, blocks, group, jb, words);
    for (int s = 0; s < w4::kSteps; ++s) {
      for (int p = 0; p < w4::kProducts; ++p) {
        mma::FragmentA a[mma::kLanes];
        mma::FragmentB b[mma::kLanes];
        for (int lane = 0; lane < mma::kLanes; ++lane) {
          a[lane] = w4::weight_fragment<IsHalf>(words[lane], p, s);
          b[lane] = w4::input_fragment(loaded[lane], s);
        }
        multiply_add<IsHalf>(c, p, a, b);
      }
    }
  }
  for (int row = 0; row < mma::kCols; ++row) {
    sums[row] = staged.sum<IsHalf, 1>(row);
    // However many lanes share it, the same bits.
    CHECK((sums[row] == staged.sum<IsHalf, 2>(row) && sums[row] == staged.sum<IsHalf, 4>(row) &&
           sums[row] == staged.sum<IsHalf, 8>(row)));
  }
  fold_group(packed, blocks, group, totals,
             [&](float total, int lane, int p, int reg, float scale, float zero) {
               return w4::fold(total, c[lane][p][reg], sums[mma::c_col(lane, reg)], scale, zero);
             });
}

template <bool IsHalf>
std::vector<float> linear(const Matrix& x, const Packed& packed) {
  return linear_by_blocks(
      packed, x.rows, [&](const int64_t (&blocks)[2], int64_t first_row, int64_t group, WarpSums& totals) {
        multiply_group<IsHalf>(packed, blocks, group, Staged(x, first_row, group), totals);
      });
}

TEST(w4_fragments_multiply_like_loops) {
  Random random(11);
  for (const DType type : {DType::kBFloat16, DType::kFloat16}) {
    int i = 0;
    for (const LinearShape& shape : kLinearShapes) {
      const Packed packed = pack(Matrix::random(random, kDTypes[i % 3], shape.n, shape.k), w4::kGroup, 1);
      const Matrix x = Matrix::random(random, type, shape.m, shape.k, i++ % 2 * 3);
      const auto out = type == DType::kFloat16 ? linear<true>(x, packed) : linear<false>(x, packed);
      for (int64_t m = 0; m < shape.m; ++m) {
        for (int64_t n = 0; n < shape.n; ++n) {
          double sum = 0.0, terms = 0.0;
          for (int64_t k = 0; k < shape.k; ++k) {
            sum += x.at(m, k) * packed.value(n, k);
            terms += std::abs(x.at(m, k)) * packed.magnitude(n, k);
          }
          CHECK_NEAR(out[static_cast<size_t>(m * shape.n + n)], sum, 0x1p-20 * terms);
        }
      }
    }
  }
}

TEST(w4_pair_values_are_sixteen_plus_the_level) {
  for (uint32_t low = 0; low < 16; ++low) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t high = 15 - low, noise = 0xA5A5A5A5u & ~(0x000F000Fu << 4 * i);
      const uint32_t word = noise | low << nibble_shift(0, i) | high << nibble_shift(1, i);
      CHECK(element<false>(w4::pair_value<false>(word, i), 0) == 16.0 + low);
      CHECK(element<false>(w4::pair_value<false>(word, i), 1) == 16.0 + high);
      CHECK(element<true>(w4::pair_value<true>(word, i), 0) == 16.0 + low);
      CHECK(element<true>(w4::pair_value<true>(word, i), 1) == 16.0 + high);
    }
  }
}

TEST(w4_schedules_cover_every_group_once_and_fit_the_workspace) {
  for (const int64_t rows : {1, 128, 129, 512, 3584, 4608, 18944, 37888, 152064}) {
    for (const int64_t cols : {1, 128, 129, 896, 3584, 4864, 18944}) {
      const w4::Schedule cut = w4::schedule(rows, cols);
      const int64_t groups = (cols + w4::kGroup - 1) / w4::kGroup;
      CHECK(int64_t{cut.tiles} * w4::kTileRows >= rows && int64_t{cut.tiles - 1} * w4::kTileRows < rows);
      CHECK(cut.split_groups % w4::kPhases == 0);
      CHECK(int64_t{cut.splits} * cut.split_groups >= groups &&
            int64_t{cut.splits - 1} * cut.split_groups < groups);
      CHECK(cut.splits == 1 || cut.tiles * cut.splits <= w4::kMostParts);
    }
  }
  CHECK(w4::schedule(3584, 3584).splits > 1 && w4::schedule(152064, 3584).splits == 1);
}

// What a lane of quantize_pack holds of its row.
struct LaneInputs {
  float x[4][quantize::kRun] = {};
  int count[4] = {};
};

// The codes of a pass's rows, found as the kernel finds them: each lane's share of the sums, then those of
// its row's lanes.
template <int Group>
void find_codes(const LaneInputs (&inputs)[32], bool clip_search, GroupCode (&codes)[32]) {
  using namespace quantize;
  constexpr int kPerRow = Lanes<Group>::kPerRow;
  for (int first = 0; first < 32; first += kPerRow) {
    float lo = std::numeric_limits<float>::infinity(), hi = -lo;
    for (int lane = first; lane < first + kPerRow; ++lane) {
      for (int quarter = 0; quarter < 4; ++quarter) {
        for (int i = 0; i < inputs[lane].count[quarter]; ++i) {
          lo = std::min(lo, inputs[lane].x[quarter][i]);
          hi = std::max(hi, inputs[lane].x[quarter][i]);
        }
      }
    }
    const bool exists = inputs[first].count[0] > 0;
    const GroupCode whole = exists ? group_code(lo, hi) : GroupCode{};
    clip::Search search = clip::begin(lo, hi, whole);
    for (int index = 0; clip_search && index < clip::kCandidates; ++index) {
      const clip::Candidate candidate = clip::candidate(search, index);
      uint32_t squares = 0;
      for (int lane = first; lane < first + kPerRow; ++lane) {
        int units[4][kRun];
        lane_units(inputs[lane].x, whole, units);
        squares += lane_squares(units, inputs[lane].count, candidate);
      }
      clip::compare(search, index, candidate, squares);
    }
    for (int lane = first; lane < first + kPerRow; ++lane) codes[lane] = exists ? search.best : GroupCode{};
  }
}

// A warp of quantize_pack: the same bits as the CPU's packer.
template <int Group>
void check_pack(const Matrix& weight, bool clip_search) {
  using namespace quantize;
  using Split = Lanes<Group>;
  const Packed truth = pack(weight, Group, 1, clip_search);
  const PackedShape& shape = truth.shape;
  for (int64_t item = 0; item < shape.row_blocks() * shape.groups(); ++item) {
    const int64_t block = item / shape.groups(), group = item % shape.groups();
    Exact<uint8_t> made(shape.group_bytes(), 0xAB);
    int written = 0;
    for (int pass = 0; pass < Split::kPasses; ++pass) {
      LaneInputs inputs[32];
      GroupCode codes[32];
      uint32_t words[32][kLaneWords];
      for (int lane = 0; lane < 32; ++lane) {
        const int64_t row = block * kRowBlock + pass * Split::kRows + lane_row<Group>(lane);
        for (int quarter = 0; row < shape.rows && quarter < 4; ++quarter) {
          const int64_t input = group * Group + run_input<Group>(lane_part<Group>(lane), quarter);
          int& count = inputs[lane].count[quarter];
          for (; count < kRun && input + count < shape.cols; ++count)
            inputs[lane].x[quarter][count] = static_cast<float>(weight.at(row, input + count));
        }
      }
      find_codes<Group>(inputs, clip_search, codes);
      for (int lane = 0; lane < 32; ++lane) {
        const int64_t row = block * kRowBlock + pass * Split::kRows + lane_row<Group>(lane);
        CHECK(truth.meta(row, group, 0) == codes[lane].scale_bits &&
              truth.meta(row, group, 1) == codes[lane].zero_bits);
        for (int which = 0; which < kLaneWords; ++which)
          words[lane][which] = lane_word(inputs[lane].x, inputs[lane].count, which, codes[lane]);
      }
      for (int turn = 0; turn < 2; ++turn) {
        uint32_t before[32][kLaneWords];
        std::memcpy(before, words, sizeof(words));
        for (int lane = 0; lane < 32; ++lane) {
          const int other = partner<Group>(lane, turn);
          for (int which = 0; which < 2; ++which)
            words[lane][sent_word<Group>(lane, turn, which)] =
                before[other][sent_word<Group>(other, turn, which)];
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int byte = store_byte<Group>(lane, pass);
        CHECK(byte % 16 == 0 && byte + 16 <= made.size());
        std::memcpy(made.data() + byte, words[lane], 16);
        written += 16;
      }
    }
    CHECK(written == made.size());
    CHECK(std::memcmp(made.data(), truth.packed.data() + item * shape.group_bytes(), made.size()) == 0);
  }
}

TEST(quantize_lanes_pack_the_same_bits) {
  Random random(12);
  int i = 0;
  for (const LinearShape& shape : kLinearShapes) {
    check_pack<128>(Matrix::random(random, kDTypes[i % 3], shape.n, shape.k, i % 2 * 3), i % 2 > 0);
    check_pack<64>(Matrix::random(random, kDTypes[(i + 1) % 3], shape.n, shape.k), i % 2 == 0);
    ++i;
  }
}

}  // namespace
}  // namespace sglang_er::cpu
