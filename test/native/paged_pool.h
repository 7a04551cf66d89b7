// A paged KV pool, its requests and its shadow, in exact buffers.
#pragma once

#include <algorithm>
#include <numeric>

#include "paged_attention_op.h"
#include "sglang_er/kv_shadow.h"
#include "testing.h"

namespace sglang_er::cpu {

struct Dims {
  int q_heads, kv_heads, head_dim, value_dim;
};
struct Request {
  int64_t context, queries;
};

// A pool of exactly the slots that the requests use, in random order, and their slot table.
struct Pool {
  Dims dims;
  std::vector<Request> requests;
  int64_t tokens = 0, slots = 0, columns = 1;
  Exact<int64_t> rows, query_begin, context_lens;
  Matrix keys, values, q;
  Exact<int32_t> table;

  static int64_t sum(const std::vector<Request>& requests, int64_t Request::* part) {
    int64_t total = 0;
    for (const Request& request : requests) total += request.*part;
    return total;
  }
  Pool(Random& random, Dims dims, const std::vector<Request>& all, DType kv_type, DType q_type, int64_t gap)
      : dims(dims),
        requests(all),
        tokens(sum(all, &Request::queries)),
        slots(sum(all, &Request::context)),
        columns(std::max_element(all.begin(), all.end(), [](auto a, auto b) { return a.context < b.context; })
                    ->context),
        rows(static_cast<int64_t>(all.size())),
        query_begin(rows.size() + 1),
        context_lens(rows.size()),
        keys(Matrix::random(random, kv_type, slots, int64_t{dims.kv_heads} * dims.head_dim, gap)),
        values(Matrix::random(random, kv_type, slots, int64_t{dims.kv_heads} * dims.value_dim, gap * 2)),
        q(Matrix::random(random, q_type, tokens, int64_t{dims.q_heads} * dims.head_dim, gap)),
        table(rows.size() * columns, -1) {
    std::vector<int32_t> order(slots);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    int64_t next = 0;
    for (int64_t b = 0; b < rows.size(); ++b) {
      rows[b] = rows.size() - 1 - b;
      query_begin[b + 1] = query_begin[b] + all[b].queries;
      context_lens[b] = all[b].context;
      for (int64_t p = 0; p < all[b].context; ++p) table[rows[b] * columns + p] = order[next++];
    }
  }
};

struct Shadow {
  int bits;
  Exact<uint8_t> keys, values, valid;
  Exact<uint16_t> key_scales, value_scales;  // NaN where nothing was stored

  Shadow(const Pool& pool, int bits)
      : bits(bits),
        keys(pool.slots * pool.dims.kv_heads * pool.dims.head_dim * bits / 8, 77),
        values(pool.slots * pool.dims.kv_heads * pool.dims.value_dim * bits / 8, 77),
        valid(pool.slots),
        key_scales(pool.slots * pool.dims.kv_heads, 0x7FC0),
        value_scales(pool.slots * pool.dims.kv_heads, 0x7FC0) {}

  double level(bool value, int64_t vector, int dim, int d) const {
    const Exact<uint8_t>& bytes = value ? values : keys;
    if (bits == 8) return static_cast<int8_t>(bytes[vector * dim + d]);
    const int byte = value ? d / 32 * 16 + d % 16 : d / 2, shift = (value ? d / 16 % 2 : d % 2) * 4;
    return bytes[vector * (dim / 2) + byte] >> shift & 15;
  }
  double dequantized(bool value, int64_t vector, int dim, int d) const {
    const double scale = bf16_to_float((value ? value_scales : key_scales)[vector]);
    return (level(value, vector, dim, d) - (bits == 4 ? 7.5 : 0.0)) * scale;
  }
  KvShadowView view(int exact_newest) const {
    return {bits,         keys.data(), values.data(), key_scales.data(), value_scales.data(),
            valid.data(), exact_newest};
  }
};

}  // namespace sglang_er::cpu
