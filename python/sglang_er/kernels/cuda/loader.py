"""Loads the CUDA libraries, each once, at the first call of its op."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sglang_er.kernels.cpu.loader import LIBRARY_VERSION, LibraryError
from sglang_er.kernels.cuda import build
from sglang_er.kernels.cuda.specs import Arch, arch_of, spec_of


@functools.cache
def arch(device: torch.device) -> Arch | None:
    """The compiler's target for a GPU; None if there are no kernels for it."""
    return arch_of(torch.cuda.get_device_capability(device))


def serves(name: str, device: torch.device) -> bool:
    """Whether there is a library of this name for this GPU; it may still have to be built."""
    target = arch(device)
    return target is not None and target.name in spec_of(name).archs


@functools.cache
def module(name: str, device: torch.device | None = None) -> Any:
    """The library of a spec for a GPU (None: the current one); its functions are attributes. Kernels run on torch's
    current stream, which tvm-ffi passes on with the tensors of a call."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    target = arch(device)
    if target is None or target.name not in spec_of(name).archs:
        major, minor = torch.cuda.get_device_capability(device)
        raise LibraryError(f"CUDA kernels: there is no {name} for compute capability {major}.{minor} ({device})")
    return load(name, target)


@functools.cache
def load(name: str, target: Arch) -> Any:
    """As ``module``, for a named target: loading needs no GPU."""
    import tvm_ffi

    spec = spec_of(name)
    path = build.find(spec, target)
    try:
        loaded = tvm_ffi.load_module(path)
        version = loaded.library_version()
    except (AttributeError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise LibraryError(f"CUDA kernels: {path} does not load: {reason}") from error
    if version != LIBRARY_VERSION:
        raise LibraryError(f"CUDA kernels: {path} is version {version}, this package needs {LIBRARY_VERSION}")
    missing = [function for function in spec.functions if not hasattr(loaded, function)]
    if missing:
        raise LibraryError(f"CUDA kernels: {path} has no function {missing[0]}")
    return loaded
