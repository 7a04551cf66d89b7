// fp8.h and the fp8 shadow of kv_shadow_quantize.h against the definition of the numbers.
#include <algorithm>

#include "sglang_er/fp8.h"
#include "sglang_er/kv_shadow_quantize.h"
#include "testing.h"

namespace sglang_er::cpu {
namespace {

double fp8_number(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

TEST(fp8_is_the_nearest_number_ties_to_even) {
  for (int code = 0; code < 0x7E; ++code) {
    const auto number = static_cast<float>(fp8_number(code)), next = static_cast<float>(fp8_number(code + 1));
    const float middle = (number + next) / 2;
    CHECK(float_to_fp8(number) == code && float_to_fp8(-number) == (code | 0x80));
    CHECK(float_to_fp8(middle) == (code % 2 == 0 ? code : code + 1));
    CHECK(float_to_fp8(std::nextafter(middle, 0.0f)) == code);
    CHECK(float_to_fp8(-std::nextafter(middle, 500.0f)) == ((code + 1) | 0x80));
  }
}

TEST(fp8_has_no_code_that_is_not_a_number) {
  const float infinity = std::numeric_limits<float>::infinity(),
              nan = std::numeric_limits<float>::quiet_NaN();
  for (float value : {448.0f, 449.0f, 464.0f, 1e9f, std::numeric_limits<float>::max(), infinity}) {
    CHECK(float_to_fp8(value) == 0x7E && float_to_fp8(-value) == 0xFE);
  }
  CHECK(float_to_fp8(nan) == 0 && float_to_fp8(-nan) == 0);
  CHECK(float_to_fp8(std::numeric_limits<float>::denorm_min()) == 0 && float_to_fp8(-0.0f) == 0x80);
}

// test/unit/kernels/test_fp8_shadow.py has the same sum of what PyTorch makes of the same numbers.
TEST(fp8_has_the_bits_of_the_reference) {
  uint64_t sum = 0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    if ((bits & 0x7F80u) == 0x7F80u) continue;  // not finite
    sum = (sum * 31 + float_to_fp8(bf16_to_float(static_cast<uint16_t>(bits)))) % 1000000007u;
  }
  CHECK(sum == 925820336u);
}

TEST(fp8_shadow_errs_by_a_seventeenth_at_most) {
  Random random(53);
  for (int vector = 0; vector < 300; ++vector) {
    std::vector<float> x(64);
    for (float& value : x) value = static_cast<float>(std::ldexp(normal(random), vector % 120 - 60));
    if (vector % 3 == 0) x[5] *= 1000.0f;  // others become small or subnormal levels
    float largest = 0.0f;
    for (float value : x) largest = std::max(largest, std::abs(value));
    const uint16_t bits = shadow_scale_bits(largest, ShadowFormat::kFp8);
    const double scale = bf16_to_float(bits);
    for (float value : x) {
      const int code = shadow_level(value, shadow_inverse_scale(bits), ShadowFormat::kFp8);
      CHECK(code >= 0 && (code & 0x7F) <= 0x7E);
      const double bound = std::max(std::abs(value) / 17.0, scale / 1024.0) * (1.0 + 1e-6);
      CHECK_NEAR(fp8_number(code) * scale, value, bound);
      if (std::abs(value) == largest) CHECK((code & 0x7F) == 0x7E);
    }
  }
  CHECK(shadow_scale_bits(0.0f, ShadowFormat::kFp8) == kMinShadowScaleBits);
}

}  // namespace
}  // namespace sglang_er::cpu
