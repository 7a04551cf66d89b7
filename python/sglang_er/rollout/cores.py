"""How many cores this process may really use: affinity, cgroup quota, and cores rather than their hardware threads."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

_ROOT = Path("/")


def allowed() -> list[int]:
    """Numbers of the logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical(logical: Collection[int], root: Path = _ROOT) -> int:
    """Physical cores among these logical ones; where nothing tells which share one, every one counts."""
    cores = set()
    for number in logical:
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        package, core = (_read(topology / name) for name in ("physical_package_id", "core_id"))
        cores.add((package, core) if core is not None else number)
    return max(1, len(cores))


def quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that the cgroups of this process are given, the tightest of them; None without a limit."""
    limits = list(_quotas(root))
    return min(limits) if limits else None


def _quotas(root: Path) -> Iterator[float]:
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        inner = Path(path.lstrip("/"))
        # A container may see its own group as the root: then the path is there in no other way.
        folders = [inner, *inner.parents]
        if controllers == "":
            for folder in folders:
                words = (_read(root / "sys/fs/cgroup" / folder / "cpu.max") or "").split()
                if len(words) == 2 and words[0] != "max":
                    yield int(words[0]) / int(words[1])
        elif "cpu" in controllers.split(","):
            for folder in folders:
                base = root / "sys/fs/cgroup/cpu" / folder
                time, period = (_read(base / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
                if time is not None and period is not None and int(time) > 0:
                    yield int(time) / int(period)


def default_threads(root: Path = _ROOT) -> int:
    """Threads for arithmetic: one a physical core, never more than the quota pays for.

    The load is not asked: a server lives longer than what happens to run while it starts.
    """
    threads = physical(allowed(), root)
    limit = quota(root)
    return threads if limit is None else max(1, min(threads, int(limit)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
