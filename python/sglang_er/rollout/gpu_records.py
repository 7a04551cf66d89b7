"""What scripts/gpu_check.sh recorded (`gpu_check.jsonl`, one JSON object a line), for those who compute with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PASSED, FAILED = "passed", "failed"
_FIELDS = {"section": str, "cell": str, "status": str, "values": dict, "date": str, "commit": str, "device": str}


class RecordsError(ValueError):
    """A file without records that can be used; the message is one line."""


COMMITTED = Path(__file__).resolve().parents[3] / "bench" / "gpu"
"""Of a source tree; a wheel has none. A run writes into `out` there, which is nobody's result yet."""


def committed(folder: Path = COMMITTED) -> list[Path]:
    """The files of records that belong to the source tree."""
    return sorted(path for path in folder.rglob("*.jsonl") if "out" not in path.relative_to(folder).parts)


def read(paths: Iterable[Path]) -> list[Record]:
    """Records of real runs, the oldest first; lines that were cut off and dry runs are left out. Raises RecordsError,
    OSError."""
    found = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise RecordsError(f"{path}: not a file of scripts/gpu_check.sh") from None
        records = list(_records(lines))
        if lines and not records:
            raise RecordsError(f"{path}: not a file of scripts/gpu_check.sh")
        found += [record for record in records if not record.get("dry_run")]
    return sorted(found, key=lambda record: record["date"])


def _records(lines: Iterable[str]) -> Iterator[Record]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in _FIELDS.items()):
            yield record


def newest(records: Iterable[Record], *sections: str) -> dict[str, Record]:
    """The last measurement of every cell of these sections, passed or failed."""
    return {
        record["cell"]: record
        for record in records
        if record["section"] in sections and record["status"] in (PASSED, FAILED)
    }
