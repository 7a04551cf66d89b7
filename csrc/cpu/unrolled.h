// A loop whose counter is a constant in each of its rounds.
#pragma once

#include <type_traits>
#include <utility>

#include "sglang_er/macros.h"

namespace sglang_er::cpu {
namespace {

// Calls use(i) for i = 0 .. N - 1 as compile-time constants.
template <int N, class Fn>
SGLANG_ER_INLINE void unrolled(const Fn& use) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (use(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

}  // namespace
}  // namespace sglang_er::cpu
