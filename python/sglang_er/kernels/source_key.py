"""One short hash for all GPU kernels of this package: times that were measured with others say nothing about them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from sglang_er.kernels.cuda import build
from sglang_er.kernels.cuda.specs import SPECS


@functools.cache
def source_key() -> str:
    """Of the CUDA sources with all that they include, the Python that builds and calls them, and the Triton kernels.
    Raises LibraryError for an incomplete installation."""
    package, csrc = Path(__file__).resolve().parent, build.sources()
    files = {f"csrc/{path.relative_to(csrc).as_posix()}": path for spec in SPECS for path in build.files_of(spec)}
    for room in ("cuda", "triton"):
        files |= {f"{room}/{path.name}": path for path in (package / room).glob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
