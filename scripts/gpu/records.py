"""One JSON object a line for every cell that was measured, written at once: a run that is cut off goes on from it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "sglang", "sglang-er", "sglang-kernel", "transformers", "apache-tvm-ffi")
# `error`: an exception, a crash or a time-out, tried again by the next run; `failed`: measured, and wrong.
PASSED, FAILED, ERROR, SKIPPED = "passed", "failed", "error", "skipped"


@dataclass(frozen=True)
class Identity:
    """What a record is about: only records of the same commit, device and kind of run stand for each other."""

    commit: str
    device: str
    dry_run: bool
    versions: Mapping[str, str | None]

    def owns(self, record: Mapping[str, Any]) -> bool:
        return all(record.get(name) == getattr(self, name) for name in ("commit", "device", "dry_run"))


class Journal:
    """The records of one run in `path`; those of `earlier` files that are about the same are taken over."""

    def __init__(self, path: Path, identity: Identity, earlier: Iterable[Path] = ()) -> None:
        self.path, self.identity = path, identity
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as cut_off:
                cut_off.write("\n")
        known = [record for record in read(path) if identity.owns(record)]
        for record in known:
            self._keep(record)
        for file in earlier:
            for record in read(file):
                if identity.owns(record) and record not in known:
                    self._keep(record)
                    self._write(record)

    def find(self, section: str, cell: str) -> dict[str, Any] | None:
        """The newest record of this cell."""
        return self._records.get((section, cell))

    def measured(self, section: str, cell: str) -> bool:
        record = self.find(section, cell)
        return record is not None and record["status"] in (PASSED, FAILED)

    def append(self, section: str, cell: str, status: str, seconds: float, values: Mapping[str, Any]) -> dict[str, Any]:
        record = {
            "section": section,
            "cell": cell,
            "status": status,
            "values": dict(values),
            "seconds": round(seconds, 3),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **asdict(self.identity),
        }
        self._keep(record)
        self._write(record)
        return record

    def _keep(self, record: dict[str, Any]) -> None:
        self._records[record["section"], record["cell"]] = record

    def _write(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without lines that were cut off; no file has none."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def identity(dry_run: bool, commit: str | None) -> Identity:
    """Of this checkout and machine. `commit`: what to say where the checkout has no history."""
    device, driver = ("cpu", None) if dry_run else gpu()
    versions = {"python": platform.python_version(), "driver": driver, "nvcc": nvcc(), **_packages()}
    return Identity(commit or _commit() or "unknown", device, dry_run, versions)


def gpu() -> tuple[str, str | None]:
    """Name and driver of the first GPU, `cpu` without one. Not by torch: that would take memory on the device."""
    fields = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    name, _, driver = fields.splitlines()[0].partition(",") if fields else ("cpu", "", "")
    return name.strip(), driver.strip() or None


def nvcc() -> str | None:
    """Its release line."""
    home = os.environ.get("CUDA_HOME")
    lines = _output([str(Path(home) / "bin" / "nvcc") if home else "nvcc", "--version"]).splitlines()
    return next((line.strip() for line in lines if "release" in line), None)


def _commit() -> str | None:
    from sglang_er.rollout import provenance

    return provenance.commit()


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _output(command: list[str]) -> str:
    """Empty where the program is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{command[0]}: {error}", file=sys.stderr)
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
