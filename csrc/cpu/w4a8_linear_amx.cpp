// w4a8_linear on tiles (Intel AMX): 16 rows of x times 16 rows of W times 64 inputs an instruction. Few rows
// of x, and groups of other sizes, take w4a8_linear_avx512_vnni, with the same results bit for bit.
//
// Bound: weight bytes up to 16 rows of x or so, then the ends of groups (7 vector instructions a row of x).
//
// A word of W, masked, is a row of the right operand as it is: four inputs of each of 16 outputs
// (packed_weight.h). Rows 0-7 of a tile are the low nibbles of eight words, rows 8-15 the high ones. The left
// operand is the levels of x, [tile of rows][group][64 inputs][row][64 bytes], each row's in the order of the
// words.
#include <algorithm>

#include "amx.h"
#include "w4a8_linear_avx512.h"

namespace sglang_er::cpu {
namespace {

using Levels = W4A8<Avx512Levels>;

constexpr int64_t kLeastRows = 9;  // of x: fewer are faster with vpdpbusd
constexpr int kTileInputs = 64;
constexpr int kTileWords = kTileInputs / kWeightsPerWord;
constexpr int kTileBytes = kTileRows * kTileRowBytes;
constexpr int64_t kFilledRows = 4;        // of x, by one thread
constexpr int64_t kPrefetchBytes = 4096;  // of W

// x of a pass in `tiles` tiles of `height` rows. What the last one lacks is never read as a result.
struct TiledLevels {
  int8_t* levels;
  float* terms;  // [tile][group][row][Levels::kTerms]
  int64_t groups;
  int group_tiles;  // of 64 inputs
  int tiles, height;

  int64_t row_bytes() const { return groups * group_tiles * kTileRowBytes; }
  int8_t* tile(int t, int64_t group) const {
    return levels + (t * groups + group) * group_tiles * height * kTileRowBytes;
  }
  float* tile_terms(int t, int64_t group) const {
    return terms + (t * groups + group) * height * Levels::kTerms;
  }
};

// Levels first, first + 1, ... of two quarters of a group side by side: 16 of each into 32 bytes.
SGLANG_ER_INLINE void interleave16(const int8_t* even, const int8_t* odd, int8_t* out) {
  const __m128i evens = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even));
  const __m128i odds = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(evens, odds));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm_unpackhi_epi8(evens, odds));
}

template <class T>
void fill_row(const W4A8Call& call, const TiledLevels& x, int64_t row) {
  const int group_size = call.shape.group_size, quarter = group_size / 4;
  const int t = static_cast<int>(row / x.height), in_tile = static_cast<int>(row % x.height);
  const T* source = static_cast<const T*>(call.x) + row * call.x_stride;
  alignas(64) float values[kMaxGroupSize];
  alignas(64) int8_t levels[kMaxGroupSize];
  for (int64_t group = 0; group < x.groups; ++group) {
    const int valid = static_cast<int>(std::min<int64_t>(call.shape.cols - group * group_size, group_size));
    const float* floats = as_floats(source + group * group_size, valid, group_size, values);
    Levels::quantize_group(floats, group_size, levels, x.tile_terms(t, group) + in_tile * Levels::kTerms);
    int8_t* out = x.tile(t, group) + in_tile * kTileRowBytes;
    for (int tile = 0; tile < x.group_tiles; ++tile, out += x.height * kTileRowBytes) {
      const int8_t* first = levels + tile * 2 * kTileWords;  // two inputs of each quarter to a word
      interleave16(first, first + 2 * quarter, out);
      interleave16(first + quarter, first + 3 * quarter, out + 32);
    }
  }
}

SGLANG_ER_INLINE void unpack(const uint8_t* words, uint8_t* tile) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(kNibbles));
#pragma GCC unroll 8
  for (int word = 0; word < kTileWords; ++word) {
    const __m512i raw = _mm512_loadu_si512(words + word * kWordBytes);
    _mm512_store_si512(tile + word * kTileRowBytes, _mm512_and_si512(raw, mask));
    _mm512_store_si512(tile + (kTileWords + word) * kTileRowBytes,
                       _mm512_and_si512(_mm512_srli_epi32(raw, 4), mask));
  }
}

// R blocks of 16 outputs, and what is on its way of them. Tiles are not forwarded from or to stores that are
// still under way: words are unpacked a group ahead and products are taken a group later, each in the other
// one of two places. G: tiles of 64 inputs to a group.
template <int G, int R>
struct Blocks {
  const uint8_t* packed;
  const uint16_t* meta;
  int64_t block_bytes, block_meta;
  alignas(64) uint8_t words[2][R * G * kTileBytes];
  alignas(64) int32_t products[2][kRowsPerPass * R * kRowBlock];  // [tile of x][block][row][16]
};

template <int G, int R>
SGLANG_ER_INLINE void unpack_group(Blocks<G, R>& blocks, int64_t group) {
  uint8_t* words = blocks.words[group % 2];
  for (int r = 0; r < R; ++r) {
    const uint8_t* packed = blocks.packed + r * blocks.block_bytes + group * (G * kTileWords * kWordBytes);
    for (int line = 0; line < G * kTileWords; ++line) prefetch(packed + line * kWordBytes + kPrefetchBytes);
    for (int tile = 0; tile < G; ++tile, words += kTileBytes)
      unpack(packed + tile * kTileWords * kWordBytes, words);
  }
}

// Registers 0, 1: sums of each block. 2, 3: x. 4 to 7: W, a block's two side by side. A tile of x serves all
// blocks.
template <int G, int R>
SGLANG_ER_INLINE void load_words(const uint8_t* words) {
  _tile_loadd(4, words, kTileRowBytes);
  if constexpr (G > 1) _tile_loadd(5, words + kTileBytes, kTileRowBytes);
  if constexpr (R > 1) {
    _tile_loadd(6, words + G * kTileBytes, kTileRowBytes);
    if constexpr (G > 1) _tile_loadd(7, words + 3 * kTileBytes, kTileRowBytes);
  }
}
template <int G, int R>
SGLANG_ER_INLINE void multiply(const int8_t* x, int height, int32_t* products) {
  _tile_loadd(2, x, kTileRowBytes);
  if constexpr (G > 1) _tile_loadd(3, x + height * kTileRowBytes, kTileRowBytes);
  _tile_zero(0);
  if constexpr (R > 1) _tile_zero(1);
  _tile_dpbsud(0, 2, 4);
  if constexpr (R > 1) _tile_dpbsud(1, 2, 6);
  if constexpr (G > 1) {
    _tile_dpbsud(0, 3, 5);
    if constexpr (R > 1) _tile_dpbsud(1, 3, 7);
  }
  _tile_stored(0, products, kTileRowBytes);
  if constexpr (R > 1) _tile_stored(1, products + kTileRows * kRowBlock, kTileRowBytes);
}

// totals: [M][R][16].
template <int G, int R>
SGLANG_ER_INLINE void finish_group(const TiledLevels& x, const Blocks<G, R>& blocks, int64_t m, int64_t group,
                                   float* total) {
  Floats scale[R], offset[R];
  for (int r = 0; r < R; ++r) {
    const uint16_t* meta = blocks.meta + r * blocks.block_meta + group * (2 * kRowBlock);
    scale[r] = load_bf16(meta);
    offset[r] = load_bf16(meta + kRowBlock);
  }
  const int32_t* products = blocks.products[group % 2];
  for (int t = 0; t < x.tiles; ++t, products += R * kTileRows * kRowBlock) {
    const float* terms = x.tile_terms(t, group);
    const int rows = static_cast<int>(std::min<int64_t>(m - int64_t{t} * x.height, x.height));
    for (int row = 0; row < rows; ++row, terms += Levels::kTerms) {
      for (int r = 0; r < R; ++r, total += kRowBlock) {
        const __m512i sums = _mm512_load_si512(products + (r * kTileRows + row) * kRowBlock);
        store(total, Levels::finish(sums, scale[r], offset[r], terms, load(total)));
      }
    }
  }
}

template <int G, int R>
void compute_blocks(const W4A8Call& call, const TiledLevels& x, int64_t first) {
  const PackedShape& shape = call.shape;
  Blocks<G, R> blocks;
  blocks.block_bytes = shape.block_bytes();
  blocks.block_meta = shape.block_meta();
  blocks.packed = call.packed + first * blocks.block_bytes;
  blocks.meta = call.scales_zeros + first * blocks.block_meta;
  alignas(64) float totals[kRowsPerPass * R * kRowBlock];
  for (int64_t i = 0; i < call.m * R; ++i) store(totals + i * kRowBlock, zero());
  if (x.groups > 0) unpack_group(blocks, 0);
  for (int64_t group = 0; group < x.groups; ++group) {
    if (group + 1 < x.groups) unpack_group(blocks, group + 1);
    load_words<G, R>(blocks.words[group % 2]);
    int32_t* products = blocks.products[group % 2];
    for (int t = 0; t < x.tiles; ++t, products += R * kTileRows * kRowBlock)
      multiply<G, R>(x.tile(t, group), x.height, products);
    if (group > 0) finish_group(x, blocks, call.m, group - 1, totals);
  }
  if (x.groups > 0) finish_group(x, blocks, call.m, x.groups - 1, totals);
  with_type(call.out_type, [&](auto* out) {
    with_type(call.bias_type, [&](auto* bias) {
      store_rows<std::remove_pointer_t<decltype(out)>, std::remove_pointer_t<decltype(bias)>>(
          call, totals, 0, static_cast<int>(call.m), first, R);
    });
  });
}

template <int G>
void compute_unit(const W4A8Call& call, const TiledLevels& x, int64_t block, int64_t end) {
  const Tiles::Shape rows{x.height, kTileRowBytes}, words{kTileRows, kTileRowBytes};
  const Tiles tiles({rows, rows, rows, rows, words, words, words, words});
  for (; block + 2 <= end; block += 2) compute_blocks<G, 2>(call, x, block);
  if (block < end) compute_blocks<G, 1>(call, x, block);
}

}  // namespace

void w4a8_linear_amx(const W4A8Call& call) {
  const PackedShape& shape = call.shape;
  const int group_tiles = shape.group_size / kTileInputs;
  const bool whole_tiles = shape.group_size == kTileInputs || shape.group_size == 2 * kTileInputs;
  if (call.m < kLeastRows || !whole_tiles) return w4a8_linear_avx512_vnni(call);
  TiledLevels x{};
  x.groups = shape.groups();
  x.group_tiles = group_tiles;
  x.tiles = static_cast<int>((call.m + kTileRows - 1) / kTileRows);
  x.height = static_cast<int>((call.m + x.tiles - 1) / x.tiles);
  const int64_t rows = int64_t{x.tiles} * x.height, x_bytes = rows * x.row_bytes();
  const int64_t terms_bytes = rows * x.groups * Levels::kTerms * static_cast<int64_t>(sizeof(float));
  auto* memory = static_cast<char*>(scratch(static_cast<size_t>(x_bytes + terms_bytes)));
  x.levels = reinterpret_cast<int8_t*>(memory);
  x.terms = reinterpret_cast<float*>(memory + x_bytes);
  const int64_t source_bytes = call.m * shape.cols * element_bytes(call.x_type);
  parallel_for(
      (call.m + kFilledRows - 1) / kFilledRows, threads_for(call.threads, source_bytes), [&](int64_t unit) {
        with_type(call.x_type, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          for (int64_t row = unit * kFilledRows; row < std::min((unit + 1) * kFilledRows, call.m); ++row)
            fill_row<T>(call, x, row);
        });
      });
  const int threads = threads_for(call.threads, shape.packed_bytes() * x.tiles);
  const int64_t blocks = blocks_per_unit(shape.row_blocks(), threads);
  parallel_for((shape.row_blocks() + blocks - 1) / blocks, threads, [&](int64_t unit) {
    const int64_t first = unit * blocks, end = std::min(first + blocks, shape.row_blocks());
    group_tiles == 1 ? compute_unit<1>(call, x, first, end) : compute_unit<2>(call, x, first, end);
  });
}

}  // namespace sglang_er::cpu
