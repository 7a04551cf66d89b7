"""Records as scripts/gpu_check.sh writes them, with times that nobody measured: for what computes with records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def record(section: str, cell: str, values: dict[str, Any], **changes: Any) -> Record:
    usual = {"status": "passed", "seconds": 1.0, "date": "2026-12-01T10:00:00Z"}
    identity = {"commit": "abc123", "device": "NVIDIA H200", "dry_run": False, "versions": {"torch": "2.13.0"}}
    return {"section": section, "cell": cell, "values": values, **usual, **identity, **changes}


def bench(op: str, name: str, what: str, rows: dict[str, Any], facts: dict[str, Any] | None = None, **changes: Any):
    """A cell of section `bench_kernels`."""
    values = {"op": op, "implementation": name, "dtype": "bfloat16", "kernels": "key1", **(facts or {}), "rows": rows}
    return record("bench_kernels", f"{op} {name} {what}".strip(), values, **changes)


def write(path: Path, records: Iterable[Record]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    return path
