// One lane's share of packing a group of 128 or 64 inputs for 16 rows (quantize.h has the rule,
// packed_weight.h the layout): what csrc/cuda/quantize_pack consists of, host and device.
//
// A row's group is the work of G / 32 lanes. Lane c takes 8 neighbours at 8 c of each quarter: 16-byte loads
// of 16-bit weights, and the 32 numbers are words 4 c .. 4 c + 3 of the row, complete. So that stores are 16
// bytes too, lanes of four rows exchange words: afterwards each has one word of all four, which lie side by
// side.
#pragma once

#include <bit>
#include <cstdint>

#include "sglang_er/clip_search.h"
#include "sglang_er/packed_weight.h"
#include "sglang_er/quantize.h"

namespace sglang_er::quantize {

inline constexpr int kLaneInputs = 32;
inline constexpr int kLaneWords = kLaneInputs / kWeightsPerWord;  // also the rows that exchange them
inline constexpr int kRun = 8;                                    // neighbours of a quarter

template <int Group>
struct Lanes {
  static_assert(Group == 64 || Group == 128);
  static constexpr int kPerRow = Group / kLaneInputs;
  static constexpr int kRows = 32 / kPerRow;  // at once
  static constexpr int kPasses = kRowBlock / kRows;
};

// Row of a pass and position c of a lane.
template <int Group>
SGLANG_ER_INLINE int lane_row(int lane) {
  return lane / Lanes<Group>::kPerRow;
}
template <int Group>
SGLANG_ER_INLINE int lane_part(int lane) {
  return lane % Lanes<Group>::kPerRow;
}

// Input of the group where the lane's run of a quarter begins.
template <int Group>
SGLANG_ER_INLINE int run_input(int part, int quarter) {
  return quarter * (Group / 4) + part * kRun;
}

// The lane's numbers as the clip search takes them, and its share of a candidate's sum of squares; a row's
// lanes add theirs up.
SGLANG_ER_INLINE void lane_units(const float (&x)[4][kRun], const GroupCode& whole, int (&units)[4][kRun]) {
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int i = 0; i < kRun; ++i) units[quarter][i] = clip::units(x[quarter][i], whole);
  }
}
SGLANG_ER_INLINE uint32_t lane_squares(const int (&units)[4][kRun], const int (&count)[4],
                                       const clip::Candidate& of) {
  uint32_t squares = 0;
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int i = 0; i < kRun; ++i)
      squares += i < count[quarter] ? clip::square(clip::error(units[quarter][i], of)) : 0;
  }
  return squares;
}

// quantize_value as the low bits of kRoundBits + level: adding kRound rounds, and leaves the level there.
inline constexpr float kRound = 0x1.8p23f;
inline constexpr uint32_t kRoundBits = 0x4B400000u;
SGLANG_ER_INLINE uint32_t level_bits(float weight, const GroupCode& code) {
  float level = (weight - code.zero) * code.inverse_scale;
  level = level > 0.0f ? level : 0.0f;  // also takes NaN to 0
  level = level < kMaxLevel ? level : kMaxLevel;
  return std::bit_cast<uint32_t>(level + kRound);
}

// Word `which` (0..3) of the lane. What is above the levels in their bits is the same for every word, and
// taken off modulo 2^32: one shift and addition a weight.
SGLANG_ER_INLINE constexpr uint32_t round_bits_of_word() {
  uint32_t sum = 0;
  for (int shift = 0; shift < 32; shift += 4) sum += kRoundBits << shift;
  return sum;
}
SGLANG_ER_INLINE uint32_t lane_word(const float (&x)[4][kRun], int which, const GroupCode& code) {
  uint32_t word = 0u - round_bits_of_word();
  for (int position = 0; position < 4; ++position) {
    for (int half = 0; half < 2; ++half)
      word += level_bits(x[position][2 * which + half], code) << nibble_shift(half, position);
  }
  return word;
}

// Exchange of words between lanes of four rows, in two turns. In turn 0 a lane meets that one row away, in
// turn 1 that two rows away. `words[sent_first]` and the next sent one go there, what comes takes their
// places.
template <int Group>
SGLANG_ER_INLINE int partner(int lane, int turn) {
  return lane ^ (Lanes<Group>::kPerRow << turn);
}
template <int Group>
SGLANG_ER_INLINE int sent_word(int lane, int turn, int which) {
  const bool odd = (lane_row<Group>(lane) >> turn & 1) != 0;
  const int other = odd ? 0 : 1;  // the bit of the index that the lane's own rows lack
  return turn == 0 ? 2 * which + other : which + 2 * other;
}

// Byte, in the packed group, of the lane's 16 bytes after the exchange: word 4 c + row % 4 of rows row / 4 *
// 4 ..
template <int Group>
SGLANG_ER_INLINE int store_byte(int lane, int pass) {
  const int row = lane_row<Group>(lane);
  const int word = kLaneWords * lane_part<Group>(lane) + row % 4;
  return word * kWordBytes + (pass * Lanes<Group>::kRows + row / 4 * 4) * 4;
}

}  // namespace sglang_er::quantize
