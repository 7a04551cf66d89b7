#!/usr/bin/env python3
"""Cost of a decision: what policy goodput takes between two steps, `choose` and `observe` together, and its memory.

The policy runs as in the engine, over a pretended rollout: true costs with noise, random acceptance, contexts that
grow, requests that leave and are followed by others, their names told where the batch has at most TRACKED_ROWS. The
pretence is not timed. Batch sizes lie between half of the one shown and all of it, so that no step repeats another.

    python scripts/bench_decision.py                     # limit: 100 us at batch 256, no growth of memory
    python scripts/bench_decision.py --clock cpu         # on a machine that is busy
"""

from __future__ import annotations

import argparse
import datetime
import gc
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count

from sglang_er.policy import TRACKED_ROWS, GoodputPolicy, StepOutcome, StepState
from sglang_er.rollout import machine

LIMIT_US, LIMIT_AT = 100.0, 256
GROWTH_BYTES = 4096  # numbers and the last requests' names take more or less room; nothing else may
NAMED = 4  # requests, while memory is looked at: few, because every one is told by name and many come and go
LIFE = 300  # tokens of a request
ALPHA, NOISE = 0.9, 0.03


def target_seconds(rows: int) -> float:
    return 0.010 * max(1.0, rows / 96)


class Rollout:
    """Running requests of an engine that is not there; `step` is asked for a draft length and says what it did."""

    def __init__(self, batch: int, seed: int = 0) -> None:
        self._batch, self._rng = batch, random.Random(seed)
        self._names: Iterator[int] = count()
        self._ages: dict[int, int] = {}

    def state(self, gamma_max: int) -> StepState:
        wanted = self._rng.randint((self._batch + 1) // 2, self._batch)
        for request in [request for request, age in self._ages.items() if age >= LIFE]:
            del self._ages[request]
        while len(self._ages) > wanted:
            del self._ages[next(iter(self._ages))]
        while len(self._ages) < wanted:
            self._ages[next(self._names)] = self._rng.randrange(LIFE)
        named = tuple(self._ages) if wanted <= TRACKED_ROWS else ()
        return StepState(wanted, 500 * wanted + 2 * sum(self._ages.values()), gamma_max, wanted, named)

    def outcome(self, state: StepState, gamma: int) -> StepOutcome:
        lens = []
        for request in self._ages:
            length = 1
            while length <= gamma and self._rng.random() < ALPHA:
                length += 1
            lens.append(length)
            self._ages[request] += length
        draft = gamma * 0.3 * target_seconds(state.batch_size) * self._rng.gauss(1.0, NOISE)
        verify = target_seconds(state.batch_size * (gamma + 1)) * self._rng.gauss(1.0, NOISE)
        return StepOutcome(state, gamma, lens, draft + verify, draft if gamma else float("nan"))


def decide(policy: GoodputPolicy, rollout: Rollout, gamma_max: int, clock: Callable[[], float]) -> float:
    """Seconds of one decision."""
    state = rollout.state(gamma_max)
    started = clock()
    gamma = policy.choose(state)
    chosen = clock() - started
    outcome = rollout.outcome(state, gamma)
    started = clock()
    policy.observe(outcome)
    return chosen + clock() - started


def microseconds(batch: int, gamma_max: int, steps: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Median, mean and 99th percentile over `steps` decisions."""
    policy, rollout = GoodputPolicy(gamma_max), Rollout(batch)
    for _ in range(steps // 10):
        decide(policy, rollout, gamma_max, clock)
    times = sorted(1e6 * decide(policy, rollout, gamma_max, clock) for _ in range(steps))
    return statistics.median(times), statistics.fmean(times), times[int(0.99 * len(times))]


def growth(gamma_max: int, steps: int) -> tuple[int, int, int]:
    """A tenth of the steps, the bytes that the policy's code holds after them, and how many more after all."""
    policy, rollout = GoodputPolicy(gamma_max), Rollout(NAMED)
    ours, held, first = tracemalloc.Filter(True, "*/sglang_er/policy/*"), [], steps // 10
    tracemalloc.start()
    try:
        for part in (first, steps - first):
            for _ in range(part):
                decide(policy, rollout, gamma_max, time.perf_counter)
            gc.collect()
            found = tracemalloc.take_snapshot().filter_traces([ours])
            held.append(sum(trace.size for trace in found.traces))
    finally:
        tracemalloc.stop()
    return first, held[0], held[1] - held[0]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=_numbers, default=[1, 16, 64, 256])
    parser.add_argument("--gammas", type=_numbers, default=[5, 15], help="values of gamma_max")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--memory-steps", type=int, default=100_000, help="0: memory is not looked at")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.thread_time

    print(f"{machine.look().text()}; {args.clock} clock; {datetime.date.today()}; {args.steps} decisions each")
    print("\nMicroseconds of choose and observe")
    print("batch  gamma_max   median     mean      99 %   limit")
    over = False
    for batch in args.batches:
        for gamma_max in args.gammas:
            median, mean, late = microseconds(batch, gamma_max, args.steps, clock)
            said = ""
            if batch == LIMIT_AT:
                said = f"{LIMIT_US:.0f} " + ("ok" if mean < LIMIT_US else "OVER")
                over |= mean >= LIMIT_US
            print(f"{batch:5d}  {gamma_max:9d}  {median:7.1f}  {mean:7.1f}  {late:8.1f}   {said}", flush=True)
    if args.memory_steps:
        first, held, grown = growth(max(args.gammas), args.memory_steps)
        over |= grown >= GROWTH_BYTES
        said = "ok" if grown < GROWTH_BYTES else "OVER"
        print(f"\nMemory of the policy's code at batch {NAMED}: {held} bytes after {first} steps, ", end="")
        print(f"{grown:+d} after {args.memory_steps}   below {GROWTH_BYTES} {said}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
