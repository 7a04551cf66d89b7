"""A rollout, replayed step by step over known costs: what a policy would have made of it.

The loop does what the engine does between two forwards: admit requests, tell the policy what it may know, take its
draft length, commit tokens, report the outcome a step or two late. Time passes by the true cost of a step
(`costs.py`); the policy hears a noisy one, as a clock would show it. docs/simulator.md lists what is not modelled.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sglang_er.policy import TRACKED_ROWS, Policy, StepOutcome, StepState
from sglang_er.rollout.acceptance_process import Luck
from sglang_er.rollout.arrivals import Work
from sglang_er.rollout.costs import Cycle, StepTable

_NOISE_BLOCK = 1024


@dataclass(frozen=True)
class Engine:
    """The simulated engine. `late`: steps between the end of a step and its report, as with SGLang's overlapped
    scheduler. `noise`: relative standard deviation of a measured pass; `outliers`: share of steps that seem to take
    `outlier_factor` times as long. `prefill_rate`: tokens per second, None for prefill that takes no time.
    `split`: the draft pass is timed by itself, as on a CPU; on a device that works behind the host's back it is not."""

    max_running: int
    prefill_rate: float | None = None
    late: int = 1
    noise: float = 0.02
    outliers: float = 0.01
    outlier_factor: float = 3.0
    split: bool = True


@dataclass
class Run:
    """What happened. One entry per step in the first five, one per request in `latencies`."""

    started: list[float] = field(default_factory=list)  # seconds since the rollout's start
    seconds: list[float] = field(default_factory=list)  # true ones
    sizes: list[int] = field(default_factory=list)
    gammas: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)  # from arrival to the last token
    makespan: float = 0.0  # until the last token of the last request
    prefill: float = 0.0

    @property
    def busy(self) -> float:
        return self.prefill + sum(self.seconds)


class Truth:
    """What no policy can know; only the oracle looks here. The loop keeps it up to date."""

    cycle: Cycle
    alphas: npt.NDArray[np.float64]
    at: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    factors: npt.NDArray[np.float64]

    def expected_tokens(self, limit: int) -> npt.NDArray[np.float64]:
        """Over the whole batch, for every draft length from 0 to `limit`: the mean over the chance to come."""
        kept = np.cumprod(self.alphas[self.at][:, None] * self.factors[None, :limit], axis=1)
        kept *= np.arange(1, limit + 1)[None, :] < self.left[:, None]
        return len(self.at) + np.concatenate([[0.0], np.cumsum(kept.sum(axis=0))])


def _noise(engine: Engine, seed: int) -> Iterator[tuple[float, float]]:
    """Factors on the draft and the verify pass of one step after the other, the same for every policy."""
    rng = np.random.default_rng([seed, 4])
    while True:
        factors = np.exp(rng.normal(-(engine.noise**2) / 2, engine.noise, (_NOISE_BLOCK, 2)))
        factors[rng.random(_NOISE_BLOCK) < engine.outliers] *= engine.outlier_factor
        yield from map(tuple, factors.tolist())


def simulate(
    work: Work,
    luck: Luck,
    table: StepTable,
    policy: Policy,
    engine: Engine,
    seed: int,
    truth: Truth | None = None,
    change_after: float | None = None,
) -> Run:
    """`change_after`: share of all tokens after which the second acceptance of `luck` holds."""
    return _Loop(work, luck, table, policy, engine, seed, truth or Truth(), change_after).run()


class _Loop:
    def __init__(
        self,
        work: Work,
        luck: Luck,
        table: StepTable,
        policy: Policy,
        engine: Engine,
        seed: int,
        truth: Truth,
        change_after: float | None,
    ) -> None:
        self._work, self._luck, self._table, self._policy, self._engine = work, luck, table, policy, engine
        self._noise, self._truth = _noise(engine, seed), truth
        truth.factors, truth.alphas = luck.factors, luck.alphas[0]
        self._lengths, self._start = np.asarray(work.lengths), luck.start
        self._change_at = None if change_after is None else change_after * sum(work.lengths)
        self._changed = 0  # 1 once the second acceptance holds
        self._tokens, self._now = 0, 0.0
        self._arrived = {r: time for r, time in enumerate(work.arrival) if time < math.inf}
        self._waiting = [(time, r) for r, time in self._arrived.items()]
        heapq.heapify(self._waiting)
        self._waves = deque(work.waves)
        # The running requests: names, place in the flat arrays of `luck`, tokens left, sum of their contexts.
        self._ids: tuple[int, ...] = ()
        self._at = np.zeros(0, dtype=np.int64)
        self._left = np.zeros(0, dtype=np.int64)
        self._context = 0
        self._late: deque[StepOutcome] = deque()
        self._run = Run()

    def run(self) -> Run:
        while self._ids or self._waiting:
            if not self._ids and self._waiting[0][0] > self._now:
                self._now = self._waiting[0][0]
            self._step(prefilled=self._admit())
        while self._late:
            self._policy.observe(self._late.popleft())
        self._run.makespan = self._now
        return self._run

    def _admit(self) -> bool:
        """Take in who has come; whether that took the engine's time."""
        new: list[int] = []
        room = self._engine.max_running - len(self._ids)
        while len(new) < room and self._waiting and self._waiting[0][0] <= self._now:
            new.append(heapq.heappop(self._waiting)[1])
        if not new:
            return False
        self._ids += tuple(new)
        self._at = np.concatenate([self._at, self._start[new]])
        self._left = np.concatenate([self._left, self._lengths[new]])
        self._context += sum(self._work.prompts[r] for r in new)
        if self._engine.prefill_rate is None:
            return False
        seconds = sum(self._work.new_tokens[r] for r in new) / self._engine.prefill_rate
        self._now += seconds
        self._run.prefill += seconds
        return True

    def _step(self, prefilled: bool) -> None:
        size, run = len(self._ids), self._run
        limit = min(self._table.gamma_max, int(self._left.max()) - 1)
        named = self._ids if size <= TRACKED_ROWS else ()
        state = StepState(size, self._context, limit, size, named)
        cycle = self._table.at(size, self._context / size)
        truth = self._truth
        truth.cycle, truth.at, truth.left = cycle, self._at, self._left
        # The engine clips what a policy says, too.
        gamma = max(0, min(limit, self._policy.choose(state))) if limit else 0
        accepted, committed = self._commit(gamma)
        run.started.append(self._now)
        run.seconds.append(cycle.seconds[gamma])
        run.sizes.append(size)
        run.gammas.append(gamma)
        run.committed.append(committed)
        self._now += cycle.seconds[gamma]
        self._report(state, gamma, accepted, cycle, prefilled)
        self._context += committed
        self._tokens += committed
        if self._change_at is not None and self._tokens >= self._change_at:
            self._changed, truth.alphas = 1, self._luck.alphas[1]
        if not self._left.min():
            self._retire()

    def _commit(self, gamma: int) -> tuple[list[int], int]:
        """Tokens of each request, and of all."""
        if gamma == 0:
            self._at = self._at + 1
            self._left = self._left - 1
            return [1] * len(self._ids), len(self._ids)
        runs = self._luck.runs[self._changed][self._at]
        accepted = np.minimum(np.minimum(runs, gamma) + 1, self._left)
        self._at = self._at + accepted
        self._left = self._left - accepted
        counts: list[int] = accepted.tolist()
        return counts, sum(counts)

    def _report(self, state: StepState, gamma: int, accepted: list[int], cycle: Cycle, prefilled: bool) -> None:
        on_draft, on_verify = next(self._noise)
        draft = gamma * cycle.draft
        seconds = draft * on_draft + (cycle.seconds[gamma] - draft) * on_verify
        if prefilled:
            seconds = math.nan  # the clock since the last forward has the prefill in it
        draft_seconds = draft * on_draft if gamma and self._engine.split else math.nan
        self._late.append(StepOutcome(state, gamma, accepted, seconds, draft_seconds))
        if len(self._late) > self._engine.late:
            self._policy.observe(self._late.popleft())

    def _retire(self) -> None:
        stays = self._left > 0
        for r, stay in zip(self._ids, stays.tolist()):
            if stay:
                continue
            self._context -= self._work.prompts[r] + self._work.lengths[r]
            self._run.latencies.append(self._now - self._arrived[r])
            following = self._work.following[r]
            if following >= 0:
                self._arrived[following] = self._now + self._work.delay[r]
                heapq.heappush(self._waiting, (self._arrived[following], following))
        self._ids = tuple(r for r, stay in zip(self._ids, stays.tolist()) if stay)
        self._at, self._left = self._at[stays], self._left[stays]
        if self._waves and len(self._ids) + len(self._waiting) <= self._work.left:
            for r in self._waves.popleft():
                self._arrived[r] = self._now
                heapq.heappush(self._waiting, (self._now, r))
