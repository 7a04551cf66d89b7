"""Memory that this process may use, and whether the kernel gives it huge pages."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path("/")


def total_and_available(root: Path = _ROOT) -> tuple[int, int]:
    """Bytes; a cgroup's limit lowers both."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE))
    total, available = int(fields["MemTotal"]) << 10, int(fields["MemAvailable"]) << 10
    limit = _number(root / "sys/fs/cgroup/memory.max")
    if limit is not None and limit < total:
        used = _number(root / "sys/fs/cgroup/memory.current") or 0
        total, available = limit, min(available, max(0, limit - used))
    return total, available


def huge_pages(root: Path = _ROOT) -> str | None:
    """`always`, `madvise` or `never`; None where the kernel does not say."""
    try:
        text = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return None
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen.group(1) if chosen else None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
