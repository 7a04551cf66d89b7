// One block of the CUDA kernel dequant_attention without a GPU: its warps run lane by lane over the functions
// that the kernel is made of. Beside it, what a plain loop in double precision gives.
#pragma once

#include <algorithm>

#include "paged_pool.h"
#include "sglang_er/dequant_attention.h"
#include "sglang_er/split_schedule.h"
#include "warp.h"

namespace sglang_er::cpu::warp {

using namespace dequant_attention;
inline uint32_t pair_at(const Matrix& matrix, int64_t row, int64_t col) {
  return bf16_pair(matrix.at(row, col), matrix.at(row, col + 1));
}

inline std::vector<double> rotated(std::vector<double> x) {
  const int dim = static_cast<int>(x.size());
  for (int half = 1; half < dim; half *= 2) {
    for (int i = 0; i < dim; ++i) {
      if ((i & half) != 0) continue;
      const double a = x[i], b = x[i + half];
      x[i] = a + b, x[i + half] = a - b;
    }
  }
  for (double& value : x) value /= std::sqrt(dim);
  return x;
}

// What was attended to: exp2-weighted values, and the logarithm of the sum of weights.
struct Attended {
  std::vector<double> out;
  double log_sum;
  double magnitude;  // sum of weights * |value|, the largest of all dimensions
};

// One KV head of one token, as a block of the kernel sees it.
template <int Dim>
struct Block {
  using L = Layout<Dim>;
  const Pool& pool;
  const Shadow& shadow;
  int exact_newest;
  double scale;
  int64_t request, token, head;
  int group;

  std::vector<uint16_t> high = std::vector<uint16_t>(L::kQueryWords * 2), low = high, plain = high;
  std::array<float, kTileHeads> query_sums{};

  int64_t context() const { return pool.context_lens[request]; }
  int64_t visible() const { return context() - (pool.query_begin[request + 1] - token) + 1; }
  int64_t slot(int64_t position) const { return pool.table[pool.rows[request] * pool.columns + position]; }
  bool in_shadow(int64_t p) const { return p < context() - exact_newest && shadow.valid[slot(p)] != 0; }
  std::vector<double> query(int h) const {
    std::vector<double> q(Dim);
    for (int d = 0; d < Dim; ++d) q[d] = pool.q.at(token, (head * group + h) * Dim + d);
    return q;
  }

  void prepare() {
    for (int h = 0; h < group; ++h) {
      const std::vector<double> q = query(h), turned = rotated(q);
      for (int d = 0; d < Dim; ++d) {
        plain[L::pool_query_position(h, d)] = float_to_bf16(static_cast<float>(q[d]));
        const HighLow parts = high_low(static_cast<float>(turned[d]));
        high[L::query_position(h, d)] = parts.high;
        low[L::query_position(h, d)] = parts.low;
        query_sums[h] += bf16_to_float(parts.high) + bf16_to_float(parts.low);
      }
    }
  }
  static OperandsB query_operand(const std::vector<uint16_t>& halves, int step) {
    OperandsB b;
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(b[lane].data(), halves.data() + (step * 32 + lane) * 4, sizeof(b[lane]));
    return b;
  }

  struct Running {
    Lanes<std::array<float, 2>> largest, sum{};
    std::array<SumC, L::kValueTiles> out{};
    Running() {
      for (auto& lane : largest) lane = {kLowest, kLowest};
    }
    void weigh(std::vector<SumC>& scores) {
      for (int e = 0; e < 2; ++e) {
        Lanes<float> top;
        for (int lane = 0; lane < 32; ++lane) {
          top[lane] = largest[lane][e];
          for (const SumC& tile : scores) top[lane] = std::max({top[lane], tile[lane][e], tile[lane][e + 2]});
        }
        top = reduce(top, 4, [](float a, float b) { return std::max(a, b); });
        for (int lane = 0; lane < 32; ++lane) {
          const float keep = std::exp2(largest[lane][e] - top[lane]);
          largest[lane][e] = top[lane];
          sum[lane][e] *= keep;
          for (SumC& tile : scores) {
            for (int c : {e, e + 2}) sum[lane][e] += tile[lane][c] = std::exp2(tile[lane][c] - top[lane]);
          }
          for (SumC& tile : out) tile[lane][e] *= keep, tile[lane][e + 2] *= keep;
        }
      }
    }
  };
  static OperandsB weights_operand(const SumC& weights, const std::array<float, 16>& factors) {
    OperandsB b;
    for (int reg = 0; reg < 2; ++reg) {
      Lanes<uint32_t> pairs;
      for (int lane = 0; lane < 32; ++lane) {
        const float factor = factors[lane / 4 + 8 * reg];
        pairs[lane] = bf16_pair(weights[lane][2 * reg] * factor, weights[lane][2 * reg + 1] * factor);
      }
      pairs = transpose(pairs);
      for (int lane = 0; lane < 32; ++lane) b[lane][reg] = pairs[lane];
    }
    return b;
  }

  // Bytes of a step in shared memory, and what its tokens' scores and weights are multiplied with.
  void shadow_step(int64_t base, int64_t end, Running& running) const {
    std::vector<uint8_t> keys(L::kStepBytes, 0xA5), values = keys;
    std::array<bool, kStepTokens> counts{};
    std::array<float, kStepTokens> key_factor{}, value_factor{};
    for (int row = 0; row < kStepTokens && base + row < end; ++row) {
      const int64_t vector = slot(base + row) * pool.dims.kv_heads + head;
      for (int unit = 0; unit < L::kRowUnits; ++unit) {
        const int64_t from = vector * L::kRowBytes + unit * 16;
        std::memcpy(keys.data() + L::unit_offset(row, unit), shadow.keys.data() + from, 16);
        std::memcpy(values.data() + L::unit_offset(row, unit), shadow.values.data() + from, 16);
      }
      counts[row] = in_shadow(base + row);
      if (!counts[row]) continue;
      key_factor[row] = bf16_to_float(shadow.key_scales[vector]) * static_cast<float>(scale / std::log(2.0));
      value_factor[row] = bf16_to_float(shadow.value_scales[vector]) * kValueFactor;
    }
    const auto word = [](const std::vector<uint8_t>& bytes, int offset) {
      uint32_t out;
      std::memcpy(&out, bytes.data() + offset, 4);
      return out;
    };
    std::vector<SumC> scores(2);
    for (int j = 0; j < 2; ++j) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int c = 0; c < 4; ++c) scores[j][lane][c] = kKeyOffset * query_sums[lane % 4 * 2 + c % 2];
      }
      for (int s = 0; s < L::kKeySteps; ++s) {
        OperandsA a;
        for (int lane = 0; lane < 32; ++lane) {
          const int row = j * kTileTokens + lane / 4;
          a[lane] = key_operand(word(keys, L::key_offset(row, lane) + s / 2 * 4),
                                word(keys, L::key_offset(row + 8, lane) + s / 2 * 4), s % 2);
        }
        multiply_add(scores[j], a, query_operand(high, s));
        multiply_add(scores[j], a, query_operand(low, s));
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int c = 0; c < 4; ++c) {
          const int row = j * kTileTokens + lane / 4 + c / 2 * 8;
          scores[j][lane][c] = counts[row] ? scores[j][lane][c] * key_factor[row] : -INFINITY;
        }
      }
    }
    running.weigh(scores);
    for (int j = 0; j < 2; ++j) {
      std::array<float, 16> factors;
      std::copy_n(value_factor.begin() + j * kTileTokens, 16, factors.begin());
      const OperandsB weights = weights_operand(scores[j], factors);
      for (int m = 0; m < L::kValueTiles; ++m) {
        OperandsA a;
        for (int lane = 0; lane < 32; ++lane) {
          uint32_t words[4];
          for (int r = 0; r < 4; ++r)
            words[r] = word(values, L::value_offset(j * kTileTokens + value_row(lane, r), lane) + m / 4 * 4);
          a[lane] = value_operand(pair_halves(words[0], words[1], m / 2 % 2),
                                  pair_halves(words[2], words[3], m / 2 % 2), m % 2);
        }
        multiply_add(running.out[m], a, weights);
      }
    }
  }

  void pool_tile(int64_t base, int64_t end, Running& running) const {
    const auto counts = [&](int row) { return base + row < end && !in_shadow(base + row); };
    const auto pair = [&](const Matrix& matrix, int row, int dim) {
      return counts(row) ? pair_at(matrix, slot(base + row), head * Dim + dim) : 0u;
    };
    std::vector<SumC> scores(1);
    for (int s = 0; s < L::kKeySteps; ++s) {
      OperandsA a;
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, dim = L::pool_key_dim(lane, s / 2) + s % 2 * 4;
        a[lane] = {{pair(pool.keys, g, dim), pair(pool.keys, g + 8, dim), pair(pool.keys, g, dim + 2),
                    pair(pool.keys, g + 8, dim + 2)}};
      }
      multiply_add(scores[0], a, query_operand(plain, s));
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int c = 0; c < 4; ++c) {
        scores[0][lane][c] = counts(lane / 4 + c / 2 * 8)
                                 ? scores[0][lane][c] * static_cast<float>(scale / std::log(2.0))
                                 : -INFINITY;
      }
    }
    running.weigh(scores);
    std::array<float, 16> ones;
    ones.fill(1.0f);
    const OperandsB weights = weights_operand(scores[0], ones);
    for (int m = 0; m < L::kValueTiles; ++m) {
      OperandsA a;
      for (int lane = 0; lane < 32; ++lane) {
        for (int reg = 0; reg < 4; ++reg) {
          const int dim = L::value_dim(lane, m / 2 * 2, reg % 2 != 0), r = reg / 2 * 2;
          a[lane].reg[reg] = pair_halves(pair(pool.values, value_row(lane, r), dim),
                                         pair(pool.values, value_row(lane, r + 1), dim), m % 2);
        }
      }
      multiply_add(running.out[m], a, weights);
    }
  }

  // All chunks, their warps and the merges.
  std::vector<Attended> run() {
    prepare();
    std::vector<Attended> total(group, {std::vector<double>(Dim), 0.0, 0.0});
    std::vector<double> sums(group);
    const int64_t size = chunk_tokens(visible());
    for (int chunk = 0; chunk < chunks_of(visible()); ++chunk) {
      const int begin = static_cast<int>(chunk * size);
      const int end = static_cast<int>(std::min(begin + size, visible()));
      const int shadow_end = std::clamp(static_cast<int>(context() - exact_newest), begin, end);
      for (int w = 0; w < kWarps; ++w) {
        Running running;
        const int first = begin + w * kStepTokens;
        int pool_begin = shadow_end < end ? first_step_past(first, shadow_end) : end;
        for (int i = 0; i < steps_before(first, shadow_end); ++i) {
          const int base = step_position(first, i);
          for (int p = base; p < std::min(base + kStepTokens, shadow_end); ++p) {
            if (!in_shadow(p)) pool_begin = std::min(pool_begin, base);
          }
          shadow_step(base, shadow_end, running);
        }
        for (int base = pool_begin; base < end; base += kWarps * kStepTokens) {
          pool_tile(base, end, running);
          pool_tile(base + kTileTokens, end, running);
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int e = 0; e < 2; ++e) {
            const int h = lane % 4 * 2 + e;
            if (h >= group) continue;
            const double factor = std::exp2(static_cast<double>(running.largest[lane][e]));
            sums[h] += running.sum[lane][e] * factor;
            for (int m = 0; m < L::kValueTiles; ++m) {
              for (bool up : {false, true})
                total[h].out[L::value_dim(lane, m, up)] += running.out[m][lane][e + (up ? 2 : 0)] * factor;
            }
          }
        }
      }
    }
    for (int h = 0; h < group; ++h) {
      for (double& value : total[h].out) value /= sums[h];
      total[h].log_sum = std::log(sums[h]);
    }
    return total;
  }

  Attended expected(int h) const {
    const std::vector<double> q = query(h), turned = rotated(q);
    Attended made{std::vector<double>(Dim), 0.0, 0.0};
    std::vector<double> magnitude(Dim);
    double sum = 0.0;
    for (int64_t p = 0; p < visible(); ++p) {
      const int64_t vector = slot(p) * pool.dims.kv_heads + head;
      const bool quantized = in_shadow(p);
      double score = 0.0;
      for (int d = 0; d < Dim; ++d) {
        score += quantized ? turned[d] * shadow.dequantized(false, vector, Dim, d)
                           : q[d] * pool.keys.at(slot(p), head * Dim + d);
      }
      const double weight = std::exp(score * scale);
      sum += weight;
      for (int d = 0; d < Dim; ++d) {
        const double value =
            quantized ? shadow.dequantized(true, vector, Dim, d) : pool.values.at(slot(p), head * Dim + d);
        made.out[d] += weight * value;
        magnitude[d] += weight * std::abs(value);
      }
    }
    for (double& value : made.out) value /= sum;
    made.log_sum = std::log(sum);
    made.magnitude = *std::max_element(magnitude.begin(), magnitude.end()) / sum;
    return made;
  }
};

}  // namespace sglang_er::cpu::warp
