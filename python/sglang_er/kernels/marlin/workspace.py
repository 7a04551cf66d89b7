"""The workspace of Marlin's launches: one for a dtype and a device, which one launch at a time may use.

Separate ones for streams would not do: blocks of a launch wait for each other's sums, and two launches at once, of
which neither has all its blocks on the device, would wait for ever. So a launch from another stream than the last one
first makes its stream wait for all that the last one has: calls follow each other, whatever streams they come from.
Calls from one stream pay nothing for it.

What a CUDA graph holds is ordered when it is replayed: by its stream, if the calls outside of graphs come from there
too, as in a server; else by the one who replays. Within one graph, calls must be recorded in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import torch

MOST_BLOCK_ROWS, MOST_BLOCK_COLS = 64, 256


@dataclass
class Workspace:
    """`partials`: fp32 sums of splits; `locks`: int32, which every launch leaves at zero."""

    partials: torch.Tensor
    locks: torch.Tensor
    _last: torch.cuda.Stream | None = None
    _launching: Lock = field(default_factory=Lock)

    @classmethod
    def of(cls, device: torch.device) -> Workspace:
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        partials = torch.empty(blocks * MOST_BLOCK_ROWS * MOST_BLOCK_COLS, dtype=torch.float32, device=device)
        return cls(partials, torch.zeros(blocks, dtype=torch.int32, device=device))

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Around a launch on the device's current stream. RuntimeError if that has to wait for a stream which records
        a graph."""
        if torch.cuda.is_current_stream_capturing():
            yield
            return
        stream = torch.cuda.current_stream(device)
        with self._launching:
            if self._last is not None and self._last.cuda_stream != stream.cuda_stream:
                _wait(stream, self._last)
            self._last = stream
            yield


def _wait(stream: torch.cuda.Stream, last: torch.cuda.Stream) -> None:
    with torch.cuda.stream(last):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "w4a16_linear: Marlin's calls must not overlap, and the stream of the last one records a CUDA graph: "
                "call it after the recording, or name cuda in the place of marlin"
            )
    stream.wait_stream(last)
