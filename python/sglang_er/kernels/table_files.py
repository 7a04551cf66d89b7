"""The table of measured times that a device gets: a file that the user names, or one that came with the package
(`tables/`, a file a device). One that was measured with other kernels than these is not used, which is said.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sglang_er.kernels import registry
from sglang_er.kernels.dispatch_table import DispatchTable, TableError, parse
from sglang_er.kernels.formats import MARLIN
from sglang_er.kernels.size_classes import CLASSES
from sglang_er.kernels.source_key import source_key

AUTO, OFF = "auto", "off"
FOLDER = Path(__file__).resolve().parent / "tables"


class Found(NamedTuple):
    """`text`: of the table to use, empty: none; `shown`: where it comes from; `warning`: why there is none."""

    text: str = ""
    shown: str = ""
    warning: str = ""


def find(choice: str, device: str) -> Found:
    """`choice`: auto, off, or a file's path; `device`: the GPU's name. Raises TableError, in one line, for a file that
    cannot be read, is no table, or is one for another device."""
    if choice == OFF:
        return Found()
    path = FOLDER / file_name(device) if choice == AUTO else Path(choice)
    if choice == AUTO and not path.is_file():
        return Found()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise TableError(f"{path}: cannot read the kernel table: {reason}") from None
    table = of_text(text, str(path))
    if table.device != device:
        raise TableError(
            f"{path}: times of a {table.device}, this is a {device}; measure here (scripts/gpu_check.sh --sections "
            "bench_kernels), or set kernel_table to off"
        )
    made = f"{path.name}, measured with commit {table.commit} on {table.date}"
    if table.kernels != source_key():
        return Found(
            warning=f"kernel table {made}, is about other versions of the kernels and not used: "
            "measure again with scripts/gpu_check.sh --sections bench_kernels"
        )
    return Found(text, made)


def of_text(text: str, name: str) -> DispatchTable:
    """A table of this package's ops, by implementations that share our own layout. Raises TableError."""
    names = {op: [entry.name for entry in registry.implementations(op)] for op in CLASSES}
    known = {op: [name for name in found if name != MARLIN] for op, found in names.items()}
    return parse(text, name, known)


def file_name(device: str) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"
