// What a thread holds while it attends: one tile of query rows and its memory for one split of the context.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace sglang_er::cpu {
namespace {

inline constexpr int kSplitKeys = 512;
inline constexpr int kTileRows = 64;
inline constexpr int kAhead = 32;  // rows between the one that is read and the one that is asked for

// What the registers hold at once: rows for scores, and keys for that many rows; rows of values, and vectors
// of values for that many rows.
#if defined(__AVX512F__)
inline constexpr int kScoreRows = 4, kValueRows = 8;
constexpr int keys_at_once(int rows) { return rows == 1 ? 8 : 4; }
constexpr int value_vectors(int rows) { return rows <= 2 ? 8 : rows <= 4 ? 4 : 2; }
#elif defined(__AVX2__)
inline constexpr int kScoreRows = 2, kValueRows = 2;
constexpr int keys_at_once(int) { return 2; }
constexpr int value_vectors(int rows) { return rows == 1 ? 4 : 2; }
#else
inline constexpr int kScoreRows = 1, kValueRows = 1;
constexpr int keys_at_once(int) { return 1; }
constexpr int value_vectors(int) { return 2; }
#endif

SGLANG_ER_INLINE int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Calls pass(count, first) for `rows` rows in passes of nearly equal size of up to R rows: count is a
// constant.
template <int R, class Fn>
SGLANG_ER_INLINE void for_passes(int rows, const Fn& pass) {
  const int passes = (rows + R - 1) / R;
  for (int i = 0; i < passes; ++i) {
    const int first = rows * i / passes, count = rows * (i + 1) / passes - first;
    [&]<int... C>(std::integer_sequence<int, C...>) {
      ((count == C + 1 ? pass(std::integral_constant<int, C + 1>{}, first) : void()), ...);
    }(std::make_integer_sequence<int, R>{});
  }
}

struct Span {
  int64_t begin, end;
};

struct Tile {
  int64_t request;
  int64_t kv_head;
  int64_t first_row;  // row = token of the request * group + query head of the KV head
  int rows;
  Span keys;  // positions that any row sees
};

// What will be read after a split: keys of a tile from a position on.
struct Next {
  const Tile& tile;
  int64_t position;
};

// Softmax over some keys, not yet divided by its sum, and the values weighted with it.
struct Partial {
  float* largest;  // [rows]
  float* sum;      // [rows]
  float* values;   // [rows][padded value_dim]
};

struct Workspace {
  float* q;              // [rows][padded head_dim], for keys of the pool, split as they are
  float* shadow_q;       // the same for keys of the shadow, rotated as they are
  float* scores;         // [rows][kSplitKeys]
  float* panel;          // values [kPanelKeys][padded value_dim]
  const uint8_t** rows;  // [kSplitKeys] keys, as many values, kAhead keys that come next
  float* key_scales;     // [kSplitKeys]
  float* value_scales;   // [kSplitKeys], if there is a shadow
  uint8_t* in_shadow;    // [kSplitKeys], where a key's rows lie; also only then
  Span* visible;         // [rows], positions that a row sees
  Partial split;
  Partial total;
};

}  // namespace
}  // namespace sglang_er::cpu
