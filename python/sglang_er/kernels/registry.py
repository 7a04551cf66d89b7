"""Which implementation of an op serves a device, a dtype and these arguments.

Every op has the implementation ``reference`` (plain torch, any device). A CPU has one more and uses nothing else: an
unsupported dtype there is an error, and so is a library that does not load. A GPU may have several, the best first:
those that nobody has seen run on one (``proven.py``) are used only if they are named, those that fail their self-test
never, and what none of them serves is done by the reference, which is said once.

``SGLANG_ER_KERNELS``, or an argument, names who may compute: ``auto``, or names in the order of preference, as in
``cuda,triton,reference``.

Among several that may, a table of measured times (``use_table``) picks the fastest for the sizes of a call, for ops of
the draft side alone (``size_classes.py`` says which and why). Sizes that are not in it, other devices than GPUs, and
calls that name an implementation keep the order, and so do weights in Marlin's layout.
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
from sglang_er.kernels.dispatch_table import DispatchTable
from sglang_er.kernels.size_classes import CLASSES, At

logger = logging.getLogger(__name__)

REFERENCE = "reference"
AUTO = "auto"
ENVIRONMENT = "SGLANG_ER_KERNELS"
MOST_CHOICES = 1 << 16
"""Sizes remembered for an op; further ones are looked up each time."""


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
_table: DispatchTable | None = None


def register(op: str, implementation: Implementation) -> None:
    known = _implementations.setdefault(op, [])
    if any(other.name == implementation.name for other in known):
        raise ValueError(f"{op}: implementation {implementation.name!r} is registered twice")
    known.append(implementation)
    candidates.cache_clear()
    _choices.cache_clear()
    _least_time.cache_clear()


def later(module: str, function: str) -> Callable[..., Any]:
    """A function whose module is imported at its first call: what it needs may not be installed here."""

    @functools.cache
    def found() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]

    return lambda *arguments: found()(*arguments)


def register_triton(op: str, dtypes: frozenset[torch.dtype], serves: Callable[..., bool] | None = None) -> None:
    """`triton/<op>.py`. For GPUs, and wherever Triton's interpreter is on for whoever names it."""
    device = None if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    function = later(f"sglang_er.kernels.triton.{op}", op)
    register(op, Implementation("triton", device, dtypes, function, serves, (op, "triton") in proven.KERNELS))


def register_cuda(
    op: str, dtypes: frozenset[torch.dtype], function: Callable[..., Any], serves: Callable[..., bool] | None = None
) -> None:
    """A kernel of csrc/cuda; before Triton's of the same op, which is asked after it."""
    register(op, Implementation("cuda", "cuda", dtypes, function, serves, proven=(op, "cuda") in proven.KERNELS))


def register_marlin(
    op: str,
    device: str | None,
    dtypes: frozenset[torch.dtype],
    function: Callable[..., Any],
    serves: Callable[..., bool],
) -> None:
    """SGLang's Marlin, on weights in its layout only; after our own kernels, and never without being named so far."""
    register(op, Implementation("marlin", device, dtypes, function, serves, (op, "marlin") in proven.KERNELS))


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


class _Choices:
    """Candidates of an op in the order of their times, for each size that was asked for: found once, then the same."""

    def __init__(self, op: str, table: DispatchTable, order: tuple[Implementation, ...]) -> None:
        self._op, self._table, self._order = op, table, order
        self._at = CLASSES[op].at
        self._known: dict[At, tuple[Implementation, ...]] = {}

    def of(self, arguments: tuple[Any, ...]) -> tuple[Implementation, ...]:
        at = self._at(*arguments)
        if at is None:
            return self._order
        return self._known.get(at) or self._find(at)

    def _find(self, at: At) -> tuple[Implementation, ...]:
        by_name = {entry.name: entry for entry in self._order}
        first = [by_name[name] for name in self._table.fastest(self._op, at, by_name)]
        found = (*first, *(entry for entry in self._order if entry not in first))
        if len(self._known) < MOST_CHOICES:
            self._known[at] = found
        return found


def use_table(table: DispatchTable) -> None:
    """From here on, for the life of the process: CUDA graphs hold what was chosen when they were recorded. Raises
    RuntimeError if another table is in use."""
    global _table
    if _table is not None and _table != table:
        raise RuntimeError("another kernel table is in use: a process keeps its first one, start a new process")
    _table = table
    _choices.cache_clear()
    _least_time.cache_clear()


def table_in_use() -> DispatchTable | None:
    return _table


@functools.cache
def _choices(op: str, device: str, dtype: torch.dtype) -> _Choices | None:
    """None where the table has nothing to choose."""
    if _table is None or op not in _table.ops or device == "cpu" or str(dtype) != f"torch.{_table.dtype}":
        return None
    order = candidates(op, device, dtype)
    return _Choices(op, _table, order) if len(order) > 1 else None


def has_kernel(op: str, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether something faster than plain torch is asked first: for whoever does without an op rather than wait."""
    kind, names = torch.device(device).type, os.environ.get(ENVIRONMENT) or AUTO
    if names == AUTO and not any(entry.device == kind and entry.proven for entry in implementations(op)):
        return False
    return resolve(op, kind, dtype).name != REFERENCE


def run(op: str, device: str, dtype: torch.dtype, names: str | None, *arguments: Any) -> None:
    """Computes ``op`` with the first implementation that takes these arguments."""
    asked = candidates(op, device, dtype, names)
    if _table is not None and names is None and (choices := _choices(op, device, dtype)) is not None:
        asked = choices.of(arguments)
    for entry in asked:
        if entry.serves is None or entry.serves(*arguments):
            entry.function(*arguments)
            return
    raise TypeError(f"{op}: these arguments are served by none of {', '.join(entry.name for entry in asked)}")


def serving(op: str, device: str, dtype: torch.dtype, *arguments: Any) -> Implementation | None:
    """Who would compute ``op`` with these arguments, but for a table; None if nobody would."""
    asked = candidates(op, device, dtype)
    return next((entry for entry in asked if entry.serves is None or entry.serves(*arguments)), None)


def least_time(op: str, device: str, dtype: torch.dtype, *arguments: Any) -> float | None:
    """Microseconds that ``op`` takes at these sizes by the table; None where it does not say."""
    if _table is None or op not in _table.ops or (at := CLASSES[op].at(*arguments)) is None:
        return None
    return _least_time(op, device, dtype, at)


@functools.lru_cache(MOST_CHOICES)
def _least_time(op: str, device: str, dtype: torch.dtype, at: At) -> float | None:
    if _table is None or str(dtype) != f"torch.{_table.dtype}":
        return None
    return _table.least(op, at, [entry.name for entry in candidates(op, device, dtype)])


def active_implementation(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the implementation that a call of ``op`` with this device and dtype asks first, but for a table."""
    return resolve(op, torch.device(device).type, dtype).name


def describe(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Who computes ``op``: the implementation that is asked first, and what the table says of the sizes it has."""
    kind = torch.device(device).type
    order = [entry.name for entry in candidates(op, kind, dtype)]
    if _table is None or _choices(op, kind, dtype) is None or not (wins := _table.winners(op, order)):
        return order[0]
    ranked = ", ".join(f"{name} at {wins[name]}" for name in order if name in wins)
    return f"{order[0]} (by table {ranked} sizes)"
