#include <cstring>

#include "dequantize_op.h"
#include "parallel.h"
#include "sglang_er/bfloat16.h"

namespace sglang_er::cpu {

void dequantize(const DequantizeCall& call) {
  const PackedShape& shape = call.shape;
  const int group_size = shape.group_size;
  parallel_for(shape.rows, threads_for(call.threads, shape.rows * shape.cols * 4), [&](int64_t row) {
    const int64_t block = row / kRowBlock;
    const int lane = static_cast<int>(row % kRowBlock);
    const uint8_t* words = call.packed + block * shape.block_bytes() + lane * 4;
    const uint16_t* meta = call.scales_zeros + block * shape.block_meta() + lane;
    float* out = call.out + row * call.out_stride;
    for (int64_t group = 0; group < shape.groups(); ++group) {
      // In double, where q*scale is exact and cannot overflow; rounded once.
      const double scale = bf16_to_float(meta[0]);
      const double zero = bf16_to_float(meta[kRowBlock]);
      for (int word = 0; word < shape.words(); ++word) {
        uint32_t bits;
        std::memcpy(&bits, words + word * kWordBytes, sizeof(bits));
        for (int half = 0; half < 2; ++half) {
          for (int position = 0; position < 4; ++position) {
            const int64_t k = group * group_size + nibble_input(group_size, word, half, position);
            const uint32_t level = bits >> nibble_shift(half, position) & 15u;
            if (k < shape.cols) out[k] = static_cast<float>(level * scale + zero);
          }
        }
      }
      words += shape.group_bytes();
      meta += 2 * kRowBlock;
    }
  });
}

}  // namespace sglang_er::cpu
