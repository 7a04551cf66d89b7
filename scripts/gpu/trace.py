"""Where the time of a profiler's trace goes: when the GPU works, and the gaps between its kernels."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

GPU_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
CPU_CATEGORIES = frozenset({"cpu_op"})
LARGEST = 8


def load(path: Path) -> list[dict[str, Any]]:
    """Events of a trace, packed or not. Raises ValueError or EOFError while it is still being written."""
    raw = path.read_bytes()
    content = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    events: list[dict[str, Any]] = content["traceEvents"]
    return events


def gaps(events: Iterable[Mapping[str, Any]], categories: frozenset[str] = GPU_CATEGORIES) -> dict[str, Any]:
    """Between the first and the last of the work, which may overlap (streams, nested ops): microseconds busy and idle,
    and the largest gaps with what ran before and after them. Raises ValueError where there is no work."""
    work = sorted(
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("cat") in categories and "dur" in event
    )
    if not work:
        raise ValueError("the trace has no work of these categories: " + ", ".join(sorted(categories)))
    begin, end, last = work[0]
    idle, found = 0.0, []
    for start, stop, name in work[1:]:
        if start > end:
            idle += start - end
            found.append((start - end, last, name))
        if stop > end:
            end, last = stop, name
    span = end - begin
    largest = sorted(found, reverse=True)[:LARGEST]
    return {
        "launches": len(work),
        "span_us": round(span, 3),
        "busy_us": round(span - idle, 3),
        "idle_us": round(idle, 3),
        "idle_share": round(idle / span, 4) if span else 0.0,
        "gaps": len(found),
        "largest_gaps": [
            {"us": round(us, 3), "after": before[:120], "before": after[:120]} for us, before, after in largest
        ],
        "busiest": busiest(work),
    }


def busiest(work: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Microseconds by name, most first."""
    total: dict[str, float] = {}
    for start, stop, name in work:
        total[name[:120]] = total.get(name[:120], 0.0) + stop - start
    return {name: round(us, 3) for name, us in sorted(total.items(), key=lambda item: -item[1])[:LARGEST]}
