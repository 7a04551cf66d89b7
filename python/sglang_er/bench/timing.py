"""Timing candidates against each other: they take turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

Run = Callable[[], object]
_CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class Timing:
    """`calls` a turn, `repeats` turns. A turn begins with `warm_up` seconds of calls, at least one, that are not timed:
    they wake the threads that slept while another candidate ran, as the op before does in a forward pass, and let
    that candidate's idle threads stop spinning. On a machine that is always busy, clock `cpu` with one thread counts
    processor time, and statistic `fastest` finds the turns that nothing interrupted."""

    repeats: int = 15
    calls: int = 10
    clock: Literal["wall", "cpu"] = "wall"
    statistic: Literal["median", "fastest"] = "median"
    warm_up: float = 0.001

    def at_most(self, calls: int) -> Timing:
        """Fewer calls a turn, where a call takes long."""
        return replace(self, calls=max(1, min(self.calls, calls)))

    def seconds(self, candidates: Mapping[str, Run]) -> dict[str, float]:
        """Seconds per call of each."""
        clock = _CLOCKS[self.clock]
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for repeat in range(self.repeats + 1):
            for name, run in candidates.items():
                self._warm_up(run)
                begin = clock()
                for _ in range(self.calls):
                    run()
                if repeat:  # the first turn warms up
                    times[name].append((clock() - begin) / self.calls)
        summary = min if self.statistic == "fastest" else statistics.median
        return {name: summary(values) for name, values in times.items()}

    def _warm_up(self, run: Run) -> None:
        begin = time.perf_counter()
        run()
        while time.perf_counter() - begin < self.warm_up:
            run()


def rotate(runs: Sequence[Run], positions: Iterator[int] | None = None) -> Run:
    """Calls the next of `runs` each time: the same work on other memory, so that no cache serves it.

    Candidates over the same memory share `positions` (an `itertools.count()`): what one of them has just read is then
    not what the next one reads.
    """
    turn = count() if positions is None else positions
    return lambda: runs[next(turn) % len(runs)]()
