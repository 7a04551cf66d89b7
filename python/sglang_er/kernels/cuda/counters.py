"""Counters of split sums on a GPU: who shares them, and how long they live.

A kernel that cuts a sum counts the blocks that have come, and leaves its counters at zero. Launches that share counters
must therefore run one after the other: those of one stream do, and within a CUDA graph those that one stream of its
capture recorded. So there is a set for each stream, and for each stream of each capture. The latter is made while the
graph is captured: its memory is the graph's, and the graph itself writes the zeros, once a replay. Graphs may be
captured and replayed on any streams, also at the same time, under torch's own rule: not if they share a memory pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch

MOST = 64


class Counters:
    """`make(device)`: counters at zero, from the caching allocator, on the device's current stream.

    At most `most` sets are kept, those used last. One that is dropped goes back to where it came from, the memory of
    its stream or of its graph, which torch hands out again only behind the work that uses it.
    """

    def __init__(self, make: Callable[[torch.device], torch.Tensor], most: int = MOST) -> None:
        self._make, self._most = make, most
        self._sets: OrderedDict[tuple[torch.device, int, int], torch.Tensor] = OrderedDict()

    def of(self, device: torch.device, stream: int, capture: int) -> torch.Tensor:
        """The set of work on this stream (its handle): launched now, `capture` 0, or recorded by this capture."""
        key = (device, stream, capture)
        found = self._sets.get(key)
        if found is None:
            found = self._sets[key] = self._make(device)
        self._sets.move_to_end(key)
        while len(self._sets) > self._most:
            self._sets.popitem(last=False)
        return found
