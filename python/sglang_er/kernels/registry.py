"""Which implementation of an op serves a device and a dtype.

Every op has the implementation ``reference`` (plain torch, any device). A device with implementations of its own
uses those and nothing else: an unsupported dtype there is an error, and so is a library that does not load. The
reference serves such a device only when it is asked for, by argument or by ``SGLANG_ER_KERNELS=reference``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

REFERENCE = "reference"
ENVIRONMENT = "SGLANG_ER_KERNELS"


@dataclass(frozen=True)
class Implementation:
    name: str
    device: str | None
    """Device type that it serves; None for any."""
    dtypes: frozenset[torch.dtype]
    function: Callable[..., Any]


_implementations: dict[str, list[Implementation]] = {}


def register(op: str, implementation: Implementation) -> None:
    known = _implementations.setdefault(op, [])
    if any(other.name == implementation.name for other in known):
        raise ValueError(f"{op}: implementation {implementation.name!r} is registered twice")
    known.append(implementation)
    resolve.cache_clear()


def ops() -> list[str]:
    return sorted(_implementations)


@functools.cache
def resolve(op: str, device: str, dtype: torch.dtype, name: str | None = None) -> Implementation:
    """The implementation of ``op`` for a device type and a dtype; ``name`` overrides the choice."""
    known = _implementations.get(op)
    if known is None:
        raise KeyError(f"no kernel op {op!r}; known ops: {', '.join(ops())}")
    name = name or os.environ.get(ENVIRONMENT) or None
    if name is not None and name != "auto":
        candidates = [entry for entry in known if entry.name == name]
        if not candidates:
            names = ", ".join(entry.name for entry in known)
            raise ValueError(f"{op}: no implementation {name!r}, choose one of auto, {names}")
    else:
        candidates = [entry for entry in known if entry.device == device]
        if not candidates:
            candidates = [entry for entry in known if entry.name == REFERENCE]
            logger.warning("%s: no compiled kernel for %s, using plain torch", op, device)
    for entry in candidates:
        if entry.device in (None, device) and dtype in entry.dtypes:
            return entry
    raise TypeError(f"{op}: {candidates[0].name} does not serve {dtype} on {device}")


def active_implementation(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the implementation that a call of ``op`` with this device and dtype uses."""
    return resolve(op, torch.device(device).type, dtype).name
