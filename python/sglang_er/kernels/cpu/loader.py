"""Loads ``libsglang_er_cpu.so`` once, at the first call of a compiled op."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: F401  The library uses the OpenMP runtime that torch loads.

LIBRARY_VERSION = 3
"""Must equal ``kLibraryVersion`` in csrc/include/sglang_er/version.h."""
LIBRARY_PATH = Path(__file__).parent / "libsglang_er_cpu.so"
ISA_ENVIRONMENT = "SGLANG_ER_CPU_ISA"

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Library:
    """The functions that csrc/cpu/*binding*.cpp export."""

    quantize_pack: Function
    w4a16_linear: Function
    w4a8_linear: Function
    dequantize: Function
    make_decoder: Function
    bf16_linear: Function
    paged_attention: Function
    kv_shadow_store: Function
    sample_rows: Function
    softmax_rows: Function
    isa: Function
    supported_isas: Function
    set_isa: Function


class LibraryError(RuntimeError):
    """The compiled library is missing or does not belong to this version of the package."""


@functools.cache
def library() -> Library:
    import tvm_ffi

    if not LIBRARY_PATH.exists():
        raise LibraryError(f"{LIBRARY_PATH.name} is not built: run 'make setup'")
    try:
        module = tvm_ffi.load_module(LIBRARY_PATH)
        version = module.library_version()
    except (AttributeError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise LibraryError(f"{LIBRARY_PATH.name} does not load: run 'make setup' ({reason})") from error
    if version != LIBRARY_VERSION:
        raise LibraryError(
            f"{LIBRARY_PATH.name} is version {version}, this package needs {LIBRARY_VERSION}: run 'make setup'"
        )
    module.set_isa(os.environ.get(ISA_ENVIRONMENT) or "auto")
    return Library(**{name: getattr(module, name) for name in Library.__slots__})


def library_version() -> int:
    """Version of the loaded library's binary interface."""
    library()
    return LIBRARY_VERSION


def isa() -> str:
    """Instruction set in use: ``amx``, ``avx512_bf16``, ``avx512``, ``avx2`` or ``portable``."""
    return str(library().isa())


def supported_isas() -> list[str]:
    """Instruction sets that this machine can run, the preferred one first."""
    return str(library().supported_isas()).split()


def set_isa(name: str) -> None:
    """Forces an instruction set for the whole process (``auto``: the preferred one). For tests and measurements."""
    library().set_isa(name)
