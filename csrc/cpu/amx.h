// Tiles of Intel AMX: eight registers of up to 16 rows of 64 bytes.
//
// Their shapes are set once for a piece of work and given back behind it: a thread that holds none has
// nothing to save at a context switch, and libraries with tiles of their own find what they expect.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "sglang_er/macros.h"

namespace sglang_er::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

class Tiles {
 public:
  struct Shape {
    int rows;
    int row_bytes;
  };

  // shapes[i] is that of register i.
  explicit Tiles(const Shape (&shapes)[8]) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64);
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = static_cast<uint16_t>(shapes[i].row_bytes);
      config.rows[i] = static_cast<uint8_t>(shapes[i].rows);
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace sglang_er::cpu
