"""SGLang's compiled Marlin module, called without the wrapper around it, which allocates at every call."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

# Where SGLang has it: from 0.5.21, before.
MODULES = ("sglang.kernels.ops.gemm.gptq_marlin", "sglang.jit_kernel.gptq_marlin")
_MAKER = "_jit_gptq_marlin_module"
_LEAST_CAPABILITY = (8, 0)


class MarlinError(RuntimeError):
    """SGLang's Marlin cannot be had here; one line says what to do."""


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether the kernel is made for this GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@functools.cache
def module(dtype: torch.dtype) -> Any:
    """`gptq_marlin_gemm` for activations of `dtype` is its attribute. SGLang compiles it at first use, with nvcc: some
    minutes, once for each dtype and GPU (SGLANG_JIT_CACHE_DIR keeps it)."""
    for name in MODULES:
        try:
            source = importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name is None or not name.startswith(missing.name):
                raise
            continue
        if maker := getattr(source, _MAKER, None):
            return maker(dtype)
        break
    raise MarlinError(
        "the installed SGLang has no Marlin kernel where it is looked for: use --er-kernels without marlin"
    )
