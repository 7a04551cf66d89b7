#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace sglang_er::cpu {
namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// A 512-bit vdpbf16ps takes 2 cycles on Sapphire and Emerald Rapids (16 products a cycle, against 32 of two
// fp32 FMA units: measured .77 ns and .19 ns an instruction), and 1 cycle on Zen 4 and later, which have one
// 512-bit FMA a cycle. So bf16 dot products come first on AMD and after fp32 FMA elsewhere.
bool prefers_bf16_dot() { return __builtin_cpu_is("amd"); }

std::atomic<int>& active() {
  static std::atomic<int> isa{static_cast<int>(supported_isas().front())};
  return isa;
}

}  // namespace

bool has_avx512_vnni() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512vnni");
  return has;
}

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      return "portable";
  }
  return "unknown";
}

std::vector<Isa> supported_isas() {
  __builtin_cpu_init();
  std::vector<Isa> isas;
  if (has_avx512_bf16() && prefers_bf16_dot()) isas.push_back(Isa::kAvx512Bf16);
  if (has_avx512()) isas.push_back(Isa::kAvx512);
  if (has_avx512_bf16() && !prefers_bf16_dot()) isas.push_back(Isa::kAvx512Bf16);
  if (has_avx2()) isas.push_back(Isa::kAvx2);
  isas.push_back(Isa::kPortable);
  return isas;
}

Isa active_isa() { return static_cast<Isa>(active().load(std::memory_order_relaxed)); }

void set_isa(const std::string& name) {
  std::string known = "auto";
  for (Isa isa : supported_isas()) {
    if (name == "auto" || name == isa_name(isa)) {
      active().store(static_cast<int>(isa), std::memory_order_relaxed);
      return;
    }
    known.append(", ").append(isa_name(isa));
  }
  throw std::invalid_argument("CPU instruction set '" + name + "' is not available here; choose one of " +
                              known);
}

}  // namespace sglang_er::cpu
