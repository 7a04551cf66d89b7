#include "isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

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
bool prefers_bf16_dot() { return made_by_amd(); }

// Tiles are 8 KiB of state, which Linux grants a process on request (arch_prctl(2); children inherit it).
bool granted_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kNeeded = kBf16 | kTile | kInt8;
  unsigned a, b, c, features;
  if (!has_avx512_bf16() || !has_avx512_vnni() || __get_cpuid_count(7, 0, &a, &b, &c, &features) == 0)
    return false;
  static const bool granted = (features & kNeeded) == kNeeded && granted_tiles();
  return granted;
}

std::atomic<int>& active() {
  static std::atomic<int> isa{static_cast<int>(supported_isas().front())};
  return isa;
}

}  // namespace

bool made_by_amd() {
  static const bool amd = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
  }();
  return amd;
}

bool has_avx512_vnni() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512vnni");
  return has;
}

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
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
  if (has_amx()) isas.push_back(Isa::kAmx);
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
