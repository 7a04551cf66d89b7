"""Seconds of short calls on a device: launches are recorded in a CUDA graph, so that what is timed is the device's work
and not the launching, and their arguments rotate through more memory than the caches hold.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Several times the L2 cache of the GPUs in question (50 MB).
FOOTPRINT = 400 << 20
REPEATS, LEAST_SECONDS, MOST_CALLS, MOST_COPIES = 15, 2e-3, 1000, 512
COPY_BYTES = 2 << 30

Run = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """`seconds` of a call, a median; `graph`: replayed, else launched one by one."""

    seconds: float
    graph: bool


def copies_for(nbytes: int, device: str) -> int:
    """How many copies of arguments of that size a rotation needs; on a CPU, where a dry run times, two."""
    return max(2, min(MOST_COPIES, -(-FOOTPRINT // nbytes))) if device == "cuda" else 2


def measure(runs: Sequence[Run], device: str) -> Timed:
    """`runs`: the same call on different memory, called in turn. Raises what the calls raise."""
    return _on_gpu(runs) if device == "cuda" else _on_cpu(runs)


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy on the device, read and written."""
    size = COPY_BYTES if device == "cuda" else 1 << 20
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / measure([lambda: target.copy_(source)], device).seconds


def _on_cpu(runs: Sequence[Run]) -> Timed:
    def once() -> float:
        began = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - began) / len(runs)

    once()
    return Timed(statistics.median(once() for _ in range(3)), False)


def _on_gpu(runs: Sequence[Run]) -> Timed:
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for run in runs:  # compiles, loads, allocates
            run()
        torch.cuda.synchronize()
        rough = _events(lambda: [run() for run in runs]) / len(runs)
    rounds = max(1, min(MOST_CALLS, int(LEAST_SECONDS / max(rough, 1e-7))) // len(runs))
    calls = rounds * len(runs)

    def turn() -> None:
        for _ in range(rounds):
            for run in runs:
                run()

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turn()
        replay: Run = graph.replay
        replayed = True
    except RuntimeError:  # something synchronizes or allocates where a graph cannot
        torch.cuda.synchronize()
        replay, replayed = turn, False
    replay()
    return Timed(statistics.median(_events(replay) for _ in range(REPEATS)) / calls, replayed)


def _events(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * float(begin.elapsed_time(end))
