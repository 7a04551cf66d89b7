"""Which implementation of an op serves a device, a dtype and these arguments.

Every op has the implementation ``reference`` (plain torch, any device). A CPU has one more and uses nothing else: an
unsupported dtype there is an error, and so is a library that does not load. A GPU may have several, the best first:
those that nobody has seen run on one (``proven.py``) are used only if they are named, those that fail their self-test
never, and what none of them serves is done by the reference, which is said once.

``SGLANG_ER_KERNELS``, or an argument, names who may compute: ``auto``, or names in the order of preference, as in
``cuda,triton,reference``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sglang_er.kernels import proven, self_test

logger = logging.getLogger(__name__)

REFERENCE = "reference"
AUTO = "auto"
ENVIRONMENT = "SGLANG_ER_KERNELS"


@dataclass(frozen=True)
class Implementation:
    name: str
    device: str | None
    """Device type that it serves; None for any."""
    dtypes: frozenset[torch.dtype]
    function: Callable[..., Any]
    serves: Callable[..., bool] | None = None
    """Whether it takes these arguments, the function's own; None: all."""
    proven: bool = True
    """Seen correct on such a device: chosen without being named."""


_implementations: dict[str, list[Implementation]] = {}


def register(op: str, implementation: Implementation) -> None:
    known = _implementations.setdefault(op, [])
    if any(other.name == implementation.name for other in known):
        raise ValueError(f"{op}: implementation {implementation.name!r} is registered twice")
    known.append(implementation)
    candidates.cache_clear()


def later(module: str, function: str) -> Callable[..., Any]:
    """A function whose module is imported at its first call: what it needs may not be installed here."""

    @functools.cache
    def found() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]

    return lambda *arguments: found()(*arguments)


def register_triton(op: str, dtypes: frozenset[torch.dtype]) -> None:
    """`triton/<op>.py`. For GPUs, and wherever Triton's interpreter is on for whoever names it."""
    device = None if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    function = later(f"sglang_er.kernels.triton.{op}", op)
    register(op, Implementation("triton", device, dtypes, function, proven=(op, "triton") in proven.KERNELS))


def register_cuda(
    op: str, dtypes: frozenset[torch.dtype], function: Callable[..., Any], serves: Callable[..., bool] | None = None
) -> None:
    """A kernel of csrc/cuda; before Triton's of the same op, which is asked after it."""
    register(op, Implementation("cuda", "cuda", dtypes, function, serves, proven=(op, "cuda") in proven.KERNELS))


def ops() -> list[str]:
    return sorted(_implementations)


def implementations(op: str) -> list[Implementation]:
    """All of an op, the best first."""
    known = _implementations.get(op)
    if known is None:
        raise KeyError(f"no kernel op {op!r}; known ops: {', '.join(ops())}")
    return list(known)


@functools.cache
def candidates(op: str, device: str, dtype: torch.dtype, names: str | None = None) -> tuple[Implementation, ...]:
    """Implementations for a device type and a dtype in the order of preference, at least one; ``names``: the choice."""
    known = implementations(op)
    names = names or os.environ.get(ENVIRONMENT) or AUTO
    if names != AUTO:
        found = [entry for name in names.split(",") for entry in known if entry.name == name.strip()]
        if not found:
            choices = ", ".join(entry.name for entry in known)
            raise ValueError(f"{op}: no implementation {names!r}, choose one of auto, {choices}")
    else:
        found = [entry for entry in known if entry.device == device and entry.proven]
        if not found:
            logger.warning("%s: no compiled kernel for %s, using plain torch", op, device)
        if not found or device != "cpu":
            found += [entry for entry in known if entry.name == REFERENCE]
    usable = [entry for entry in found if entry.device in (None, device) and dtype in entry.dtypes]
    if not usable:
        raise TypeError(f"{op}: {found[0].name} does not serve {dtype} on {device}")
    if device != "cpu":
        usable = [entry for entry in usable if entry.name == REFERENCE or _works(op, entry, device, dtype)]
        if not usable:
            raise RuntimeError(f"{op}: {found[0].name} gives wrong results on this {device}; {ENVIRONMENT}=reference")
    return tuple(usable)


def _works(op: str, entry: Implementation, device: str, dtype: torch.dtype) -> bool:
    problem = self_test.problem(op, entry.function, device, dtype, entry.serves)
    if problem:
        logger.error("%s: %s is not used on this %s: %s", op, entry.name, device, problem)
    return not problem


def resolve(op: str, device: str, dtype: torch.dtype, names: str | None = None) -> Implementation:
    """The implementation that is asked first."""
    return candidates(op, device, dtype, names)[0]


def run(op: str, device: str, dtype: torch.dtype, names: str | None, *arguments: Any) -> None:
    """Computes ``op`` with the first implementation that takes these arguments."""
    asked = candidates(op, device, dtype, names)
    for entry in asked:
        if entry.serves is None or entry.serves(*arguments):
            entry.function(*arguments)
            return
    raise TypeError(f"{op}: these arguments are served by none of {', '.join(entry.name for entry in asked)}")


def active_implementation(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the implementation that a call of ``op`` with this device and dtype asks first."""
    return resolve(op, torch.device(device).type, dtype).name
