"""Running the same function of the same buffers again and again: by a CUDA graph, or by calling it.

A function given here reads and writes buffers that live as long as it does, and nothing else: no argument, no return
value, no look at a tensor's value. Calling it is then the same as replaying what was recorded of it, so that all of
this but the recording runs on a CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Literal

import torch

from sglang_er.engine.ranks import ALONE, Ranks
from sglang_er.engine.saved_memory import CUDA_GRAPH, SavedMemory
from sglang_er.kernels import proven

if TYPE_CHECKING:
    from sglang_er.config import RolloutConfig

logger = logging.getLogger(__name__)

# Before recording: at first use kernels are compiled, libraries loaded and Marlin's workspace is made, which a graph
# cannot hold.
_WARM_UP_CALLS = 2


def choice(config: RolloutConfig, device: str) -> Literal["on", "eager", "off"]:
    """How whole draft passes run; `auto` is off until graphs were seen correct on a GPU."""
    if config.draft_graphs == "auto":
        return "on" if proven.DRAFT_GRAPHS and device != "cpu" else "off"
    return config.draft_graphs


class EagerGraphs:
    """Calls the function. Also the interface."""

    def __init__(self) -> None:
        self.counts = {"recorded": 0, "replayed": 0, "called": 0}
        self.recording_seconds = 0.0
        self.nbytes = 0

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """`key`: which function of which buffers; the same key, the same work."""
        del key
        self.counts["called"] += 1
        function()

    def describe(self) -> dict[str, object]:
        return {
            **self.counts,
            "recording_seconds": round(self.recording_seconds, 3),
            "nbytes": self.nbytes,
        }


class CudaGraphs(EagerGraphs):
    """Records at the first run of a key, replays afterwards. All graphs share one pool of memory: none of them runs
    beside another, and what they leave behind lies in buffers outside of it.

    `budget`: bytes that recording may take in all on any of the `ranks`; keys that come after it is used up are called,
    and counted so, as are all while the memory of graphs is released.
    """

    def __init__(self, budget: int, memory: SavedMemory, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self._budget, self._memory, self._ranks = budget, memory, ranks
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._full = False

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        if CUDA_GRAPH in self._memory.away:
            super().run(key, function)
            return
        graph = self._graphs.get(key)
        if graph is None and not self._full:
            try:
                graph = self._graphs[key] = self._record(function)
            except torch.OutOfMemoryError:
                if not self._ranks.alone:
                    raise  # the others wait in the middle of this pass
                self._full = True
                logger.warning("sglang-er: no memory for another draft graph: further passes run unrecorded")
        if graph is None:
            super().run(key, function)
            return
        self.counts["replayed"] += 1
        graph.replay()

    def _record(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        began = time.perf_counter()
        current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP_CALLS):
                function()
        current.wait_stream(beside)
        torch.cuda.empty_cache()  # as recording does: what the warm-up left must not count for the graph
        free, graph = torch.cuda.mem_get_info()[0], torch.cuda.CUDAGraph()
        with self._memory.recording(graph, self._pool):
            function()
        self.nbytes += max(0, free - torch.cuda.mem_get_info()[0])
        self.counts["recorded"] += 1
        self.recording_seconds += time.perf_counter() - began
        if not self._ranks.agreed(self.nbytes <= self._budget):
            self._full = True
            logger.warning(
                "sglang-er: %d draft graphs take %.0f MB, more than graph_memory_mb allows: further ones are not "
                "recorded, those steps run slower",
                len(self._graphs),
                self.nbytes / 1e6,
            )
        return graph
