"""How fast memory can be read and copied here: what a decode step at small batch is measured against.

With as many threads as torch has. Reading is the fastest of three ways that do little but read, because none of them is
the memory's limit by itself on every machine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch

from sglang_er.bench.timing import Run, Timing, rotate

# Larger than the last-level cache of most machines.
FOOTPRINT = 512 << 20
# One call of a reader, large beside what a call costs: waking threads takes a tenth of reading 16 MiB.
_PIECE = 64 << 20
_COLUMNS = 1024
_ABSENT = 0xA5

_memchr = ctypes.CDLL(None).memchr
_memchr.argtypes, _memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second. `copy` counts the bytes read and those written."""

    read: float
    copy: float

    def text(self) -> str:
        return f"{self.read / 1e9:.1f} GB/s read, {self.copy / 1e9:.1f} GB/s copied"


class Stream:
    """Random memory to read, `footprint` bytes of it, and candidates that can take turns with others."""

    def __init__(self, footprint: int = FOOTPRINT) -> None:
        piece = torch.rand(min(_PIECE, footprint // 2) // (_COLUMNS * 4), _COLUMNS)
        as_bytes = piece.view(torch.uint8)
        as_bytes[as_bytes == _ABSENT] = 0
        self._pieces = [piece.clone() for _ in range(max(2, footprint // piece.nbytes))]
        self._pool = ThreadPoolExecutor(torch.get_num_threads())

    def readers(self) -> dict[str, Run]:
        """Ways to read one piece, each time another one."""
        ones, position = torch.ones(_COLUMNS), count()
        return {
            "read: memchr": rotate([partial(self._search, piece) for piece in self._pieces], position),
            "read: sum": rotate([piece.sum for piece in self._pieces], position),
            "read: matrix times vector": rotate([partial(torch.mv, piece, ones) for piece in self._pieces], position),
        }

    def rate(self, seconds: Mapping[str, float]) -> float:
        """Bytes per second of the fastest reader among these timings."""
        return self._pieces[0].nbytes / min(seconds[name] for name in self.readers())

    def measure(self, timing: Timing) -> Bandwidth:
        half = len(self._pieces) // 2
        pairs = zip(self._pieces[:half], self._pieces[half:])
        copy = rotate([partial(target.copy_, source) for source, target in pairs])
        seconds = timing.seconds({**self.readers(), "copy": copy})
        return Bandwidth(self.rate(seconds), 2 * self._pieces[0].nbytes / seconds["copy"])

    def _search(self, piece: torch.Tensor) -> None:
        """The C library looks for a byte that is not there, in as many parts as torch has threads."""
        threads = torch.get_num_threads()
        part = piece.nbytes // threads
        list(self._pool.map(lambda index: _memchr(piece.data_ptr() + index * part, _ABSENT, part), range(threads)))
