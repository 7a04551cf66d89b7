"""How fast memory can be read and copied here: what a decode step at small batch is measured against.

Plain torch, with torch's threads. Reading is the faster of two ways that do little but read, because neither of them is
the memory's limit by itself on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from sglang_er.bench.timing import Run, Timing, rotate

# Larger than the last-level cache of most machines; the caller halves it where memory is short.
FOOTPRINT = 512 << 20
_PIECES = 8


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second. `copy` counts the bytes read and those written."""

    read: float
    copy: float
    footprint: int

    def text(self) -> str:
        return f"{self.read / 1e9:.1f} GB/s read, {self.copy / 1e9:.1f} GB/s copied"


def readers(pieces: list[torch.Tensor]) -> dict[str, Run]:
    """Candidates that read fp32 pieces [rows, columns] and write next to nothing."""
    ones = torch.ones(pieces[0].shape[1])
    return {
        "sum": rotate([piece.sum for piece in pieces]),
        "matrix times vector": rotate([partial(torch.mv, piece, ones) for piece in pieces]),
    }


def measure(timing: Timing, footprint: int = FOOTPRINT) -> Bandwidth:
    """Random pieces of `footprint` bytes together, read and copied in turns."""
    columns = 1024
    rows = max(1, footprint // (_PIECES * columns * 4))
    piece = torch.rand(rows, columns)
    pieces = [piece.clone() for _ in range(_PIECES)]
    half = _PIECES // 2
    candidates = readers(pieces)
    copies = [partial(target.copy_, source) for source, target in zip(pieces[:half], pieces[half:], strict=True)]
    seconds = timing.seconds({**candidates, "copy": rotate(copies)})
    fastest = min(seconds[name] for name in candidates)
    return Bandwidth(piece.nbytes / fastest, 2 * piece.nbytes / seconds["copy"], _PIECES * piece.nbytes)
