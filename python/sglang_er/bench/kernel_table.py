"""From the records of scripts/gpu_check.sh to a table of measured times (`kernels/dispatch_table.py`)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from sglang_er.kernels.dispatch_table import DispatchTable
from sglang_er.kernels.size_classes import CLASSES
from sglang_er.rollout.gpu_records import FAILED, PASSED, Record, RecordsError, newest

BENCH, CHECK = ("bench_kernels", "bench_more"), "kernels"
# (op, kind, sizes) -> what else differs (the context of attention) -> implementation -> microseconds
_Cells = dict[tuple[str, str, tuple[int, ...]], dict[str, dict[str, float]]]


def make(records: Sequence[Record], device: str | None = None) -> DispatchTable:
    """Of the newest measurement of each cell, with the kernels of the newest record. Sizes at which fewer than two
    implementations were measured decide nothing and are left out, and so are implementations that the check found
    wrong. Raises RecordsError for records of no or several devices (`device` names one), or with nothing to choose."""
    devices = sorted({record["device"] for record in records if record["section"] in BENCH})
    if device is None and len(devices) != 1:
        raise RecordsError(f"records of {', '.join(devices) or 'no device'}: choose one with --device")
    mine = [record for record in records if record["device"] == device or device is None]
    cells = [record for record in newest(mine, *BENCH).values() if _usable(record)]
    if not cells:
        raise RecordsError(f"no measurement of section {BENCH[0]} on {device or devices[0]}")
    last = max(cells, key=lambda record: record["date"])
    key, dtype = last["values"]["kernels"], last["values"]["dtype"]
    same = [r for r in cells if r["values"]["kernels"] == key and r["values"]["dtype"] == dtype]
    wrong = {cell for cell, record in newest(mine, CHECK).items() if record["status"] == FAILED}
    ops = _ops(_collected(record for record in same if f"{_op(record)} {_name(record)}" not in wrong))
    if not ops:
        raise RecordsError(f"{last['device']}: nowhere were two implementations of one op measured at the same sizes")
    return DispatchTable(last["device"], key, dtype, last["commit"], last["date"][:10], ops)


def summary(table: DispatchTable) -> list[str]:
    """A line for every op: at how many sizes who is the fastest."""
    lines = []
    for op, kinds in table.ops.items():
        names = {name for cells in kinds.values() for times in cells.values() for name in times}
        wins = ", ".join(f"{name} at {count}" for name, count in sorted(table.winners(op, names).items()))
        lines.append(f"{op}: {wins} of {sum(map(len, kinds.values()))} sizes")
    return lines


def _usable(record: Record) -> bool:
    values = record["values"]
    return record["status"] == PASSED and {"op", "implementation", "kernels", "dtype", "rows"} <= set(values)


def _op(record: Record) -> str:
    return str(record["values"]["op"])


def _name(record: Record) -> str:
    return str(record["values"]["implementation"])


def _collected(records: Iterable[Record]) -> _Cells:
    found: _Cells = {}
    for record in records:
        op, name = _op(record), _name(record)
        for row in record["values"]["rows"].values() if op in CLASSES else ():
            if "at" in row:
                kind, sizes = row["at"]
                where = found.setdefault((op, kind, tuple(sizes)), {})
                where.setdefault(str(row.get("context", "")), {})[name] = float(row["us"])
    return found


def _ops(cells: _Cells) -> dict[str, dict[str, dict[tuple[int, ...], dict[str, float]]]]:
    """Means over the contexts at which all were measured: nobody knows the context when the choice is made."""
    ops: dict[str, dict[str, dict[tuple[int, ...], dict[str, float]]]] = {}
    for (op, kind, sizes), by_context in sorted(cells.items()):
        names = sorted({name for times in by_context.values() for name in times})
        shared = [times for times in by_context.values() if len(times) == len(names)]
        if len(names) > 1 and shared:
            ops.setdefault(op, {}).setdefault(kind, {})[sizes] = _means(shared, names)
    return ops


def _means(cells: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {name: round(statistics.fmean(times[name] for times in cells), 3) for name in names}
