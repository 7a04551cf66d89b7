"""The CUDA libraries of this package: one list, built at first use (build.py) or ahead (`sglang-er build-kernels`)."""

from __future__ import annotations

from dataclasses import dataclass

# Some kernels promise the bits of the reference, which rounds every product.
_NO_CONTRACTION = ("-fmad=false",)


@dataclass(frozen=True, slots=True)
class Spec:
    """One shared library, from one file of csrc/cuda."""

    name: str
    source: str
    functions: tuple[str, ...]
    """What it exports, besides ``library_version``."""
    defines: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    claims: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(part of a kernel's name, patterns of instructions): what all such kernels must have in their machine code."""
    archs: tuple[str, ...] = ("80", "90a", "100")
    """Targets that have the instructions it needs."""


@dataclass(frozen=True, slots=True)
class Arch:
    """A target of the compiler."""

    name: str
    shared_kb: int
    """Shared memory of a multiprocessor that its blocks can use together."""

    @property
    def sm(self) -> str:
        return f"sm_{self.name}"


_LINEAR_FUNCTIONS = ("w4a16_linear", "partial_values", "workspace_counters", "capture_id")
_INT8_FUNCTIONS = ("w4a8_linear", "level_groups", *_LINEAR_FUNCTIONS[1:])
# Weights go to shared memory 16 bytes at a time and past L1; products are made by the tensor cores.
_WIDE_COPIES = (r"LDGSTS\.E\.\S*BYPASS\S*128", r"LDSM\.16\.M88\.4")
# A launch of a CUDA graph reads its weight, then waits for the launch before it.
_EARLY_COPIES = r"LDGSTS[\s\S]*ACQBULK"
_LINEAR_CLAIMS = (("w4a16_linear_kernel", (*_WIDE_COPIES, _EARLY_COPIES, r"HMMA\.16816")),)
_INT8_CLAIMS = (
    ("w4a8_linear_kernel", (*_WIDE_COPIES, _EARLY_COPIES, r"IMMA\.16832\.S8\.S8")),
    ("quantize_rows_kernel", (r"PREEXIT[\s\S]*ACQBULK",)),
)

SPECS: tuple[Spec, ...] = (
    Spec("w4a16_linear_bf16", "w4a16_linear.cu", _LINEAR_FUNCTIONS, ("SGLANG_ER_IS_HALF=0",), (), _LINEAR_CLAIMS),
    Spec("w4a16_linear_fp16", "w4a16_linear.cu", _LINEAR_FUNCTIONS, ("SGLANG_ER_IS_HALF=1",), (), _LINEAR_CLAIMS),
    Spec("w4a8_linear_bf16", "w4a8_linear.cu", _INT8_FUNCTIONS, ("SGLANG_ER_IS_HALF=0",), (), _INT8_CLAIMS),
    Spec("w4a8_linear_fp16", "w4a8_linear.cu", _INT8_FUNCTIONS, ("SGLANG_ER_IS_HALF=1",), (), _INT8_CLAIMS),
    Spec(
        "quantize_pack",
        "quantize_pack.cu",
        ("quantize_pack",),
        flags=_NO_CONTRACTION,
        claims=(("quantize_pack_kernel", (r"LDG\.E\.\S*128", r"STG\.E\.\S*128")),),
    ),
    Spec("kv_shadow_store", "kv_shadow_store.cu", ("kv_shadow_store",), flags=_NO_CONTRACTION),
    Spec(
        "dequant_attention",
        "dequant_attention.cu",
        ("dequant_attention",),
        claims=(("attend<", (r"LDGSTS\.E\.\S*BYPASS\S*128", r"HMMA\.16816")),),
        archs=("90a", "100"),  # it subtracts in bf16
    ),
)

ARCHS: dict[str, Arch] = {arch.name: arch for arch in (Arch("80", 163), Arch("90a", 227), Arch("100", 227))}

# By compute capability. Others have less shared memory or another instruction set.
_CAPABILITIES = {(8, 0): "80", (9, 0): "90a", (10, 0): "100", (10, 3): "100"}


def spec_of(name: str) -> Spec:
    return next(spec for spec in SPECS if spec.name == name)


def arch_of(capability: tuple[int, int]) -> Arch | None:
    """The target for a device; None if no kernel serves it."""
    name = _CAPABILITIES.get(capability)
    return None if name is None else ARCHS[name]
