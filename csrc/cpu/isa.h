// Which instruction set the kernels use: the best one of this machine, or one forced for tests.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace sglang_er::cpu {

enum class Isa : int { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

Isa active_isa();
std::string_view isa_name(Isa isa);

// bf16_linear multiplies pairs of bf16: of bf16 weights, it rounds x.
constexpr bool multiplies_bf16(Isa isa) { return isa == Isa::kAmx || isa == Isa::kAvx512Bf16; }

// Whose caches and units decide between two forms for one instruction set.
bool made_by_amd();

// int8 dot products: not a level of its own, every machine with AVX512-BF16 and some others have them.
bool has_avx512_vnni();

// Every instruction set that this machine can run, the preferred one first.
std::vector<Isa> supported_isas();

// Selects by name; "auto" selects the preferred one. Throws std::invalid_argument with one clear line.
void set_isa(const std::string& name);

}  // namespace sglang_er::cpu
