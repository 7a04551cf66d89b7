"""Measured times of implementations by op, kind and sizes, and which is the fastest for sizes that come along.

A small JSON file for one device, made by `sglang-er kernel-table` from the records of scripts/gpu_check.sh:

    {"format": 1, "device": "NVIDIA H200", "kernels": KEY, "dtype": "bfloat16", "commit": ..., "date": ...,
     "ops": {OP: {"sizes": [names], "kinds": {KIND: [{"at": [sizes], "us": {IMPLEMENTATION: microseconds}}, ...]}}}}

KEY names the sources that were measured (`source_key.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_er.kernels.size_classes import CLASSES, At

FORMAT = 1
MOST_DOUBLINGS = 1.0
"""A size this far (log2) from the nearest one measured, or farther, in any dimension is not in the table."""

Times = Mapping[str, float]  # implementation -> microseconds


class TableError(ValueError):
    """A file that is no table for this device or program; the message is one line."""


@dataclass(frozen=True)
class DispatchTable:
    """`ops`: op -> kind -> sizes -> times, at least one implementation each, sizes rising."""

    device: str
    kernels: str
    dtype: str
    commit: str
    date: str
    ops: Mapping[str, Mapping[str, Mapping[tuple[int, ...], Times]]]

    def fastest(self, op: str, at: At, among: Collection[str]) -> list[str]:
        """Those of `among` that were measured at the nearest sizes, the fastest first; none for sizes that are not in
        the table."""
        times = self._nearest(op, at)
        return sorted((name for name in times if name in among), key=lambda name: times[name])

    def least(self, op: str, at: At, among: Collection[str]) -> float | None:
        """Microseconds of the fastest of `among` at the nearest sizes; None for sizes that are not in the table."""
        times = self._nearest(op, at)
        return min((times[name] for name in times if name in among), default=None)

    def _nearest(self, op: str, at: At) -> Times:
        """Of equally near sizes the smaller ones count."""
        kind, sizes = at
        nearest: Times = {}
        best = math.inf
        for measured, times in self.ops.get(op, {}).get(kind, {}).items():
            if min(sizes) < 1 or len(sizes) != len(measured):
                continue
            doublings = [abs(math.log2(size / other)) for size, other in zip(sizes, measured)]
            distance = sum(step * step for step in doublings)
            if max(doublings) < MOST_DOUBLINGS and distance < best:
                nearest, best = times, distance
        return nearest

    def winners(self, op: str, among: Collection[str]) -> dict[str, int]:
        """At how many of the op's sizes each of `among` is the fastest."""
        found: dict[str, int] = {}
        for kind, cells in self.ops.get(op, {}).items():
            for sizes in cells:
                for name in self.fastest(op, (kind, sizes), among)[:1]:
                    found[name] = found.get(name, 0) + 1
        return found

    def to_text(self) -> str:
        """JSON, one measured size a line."""
        head = {"format": FORMAT} | {name: getattr(self, name) for name in _FACTS}
        lines = [f' "{name}": {json.dumps(value)},' for name, value in head.items()]
        ops = []
        for op, kinds in self.ops.items():
            blocks = []
            for kind, cells in kinds.items():
                rows = [f"    {json.dumps({'at': sizes, 'us': dict(times)})}" for sizes, times in cells.items()]
                blocks.append(f"   {json.dumps(kind)}: [\n" + ",\n".join(rows) + "\n   ]")
            names = json.dumps(CLASSES[op].names)
            ops.append(f'  "{op}": {{"sizes": {names}, "kinds": {{\n' + ",\n".join(blocks) + "\n  }}")
        return "\n".join(["{", *lines, ' "ops": {', ",\n".join(ops), " }", "}"]) + "\n"


_FACTS = ("device", "kernels", "dtype", "commit", "date")


def parse(text: str, name: str, implementations: Mapping[str, Collection[str]]) -> DispatchTable:
    """`name`: for messages; `implementations`: those that an op may have. Raises TableError."""
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise TableError(f"{name}: not valid JSON ({error}); {_ADVICE}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TableError(f"{name}: no kernel table in format {FORMAT}; {_ADVICE}")
    if wrong := [fact for fact in _FACTS if not isinstance(content.get(fact), str)]:
        raise TableError(f"{name}: {wrong[0]} is missing; {_ADVICE}")
    try:
        ops = {op: _kinds(op, entry, implementations) for op, entry in content["ops"].items()}
    except TableError as error:
        raise TableError(f"{name}: {error}; {_ADVICE}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TableError(f"{name}: damaged ({type(error).__name__}: {error}); {_ADVICE}") from None
    return DispatchTable(**{fact: content[fact] for fact in _FACTS}, ops=ops)


_ADVICE = "make one with `sglang-er kernel-table`, or set kernel_table to off"


def _kinds(op: str, entry: Any, implementations: Mapping[str, Collection[str]]) -> dict[str, Any]:
    if op not in CLASSES:
        raise TableError(f"op {op!r} is not chosen by size, those that are: {', '.join(CLASSES)}")
    names = CLASSES[op].names
    if tuple(entry["sizes"]) != names:
        raise TableError(f"{op} has the sizes {', '.join(entry['sizes'])}, expected {', '.join(names)}")
    return {
        kind: dict(sorted(_cell(op, cell, len(names), implementations[op]) for cell in cells))
        for kind, cells in entry["kinds"].items()
    }


def _cell(op: str, cell: Any, count: int, known: Collection[str]) -> tuple[tuple[int, ...], dict[str, float]]:
    sizes, times = tuple(cell["at"]), dict(cell["us"])
    if len(sizes) != count or not all(type(size) is int and size > 0 for size in sizes):
        raise TableError(f"{op} at {list(sizes)}: expected {count} sizes from 1 up")
    for name, value in times.items():
        if name not in known:
            raise TableError(f"{op} has no implementation {name!r} to choose by size, there are: {', '.join(known)}")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise TableError(f"{op} at {list(sizes)}: {name} takes {value!r}, expected microseconds above 0")
    return sizes, times
