"""Policies against each other on the same simulated rollouts: seeds, rollouts in a row, what is kept of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_er.rollout.acceptance_process import Acceptance, Luck
from sglang_er.rollout.arrivals import Arrivals, Lengths, Work, make_work
from sglang_er.rollout.costs import StepTable
from sglang_er.rollout.intervals import MeanInterval, mean_interval
from sglang_er.rollout.simulate import Engine, Run, Truth, simulate
from sglang_er.rollout.simulated_policies import PolicyOptions, make
from sglang_er.rollout.timeline import Row

BASELINES = ("ar", "oracle")
TIMELINE_ROWS = 60
# Seeds of the rollouts in a row lie this far apart.
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Plan:
    """What is simulated. `requests`: None takes those of a length file."""

    table: StepTable
    lengths: Lengths
    requests: int | None
    prompt: int
    arrivals: Arrivals
    acceptance: Acceptance
    engine: Engine
    options: PolicyOptions
    policies: Sequence[str]
    seeds: int = 20
    rollouts: int = 1

    def all_policies(self) -> list[str]:
        """Those asked for, between the two that all are compared with."""
        return list(dict.fromkeys(["ar", *(name for name in self.policies if name != "oracle"), "oracle"]))


@dataclass
class Sample:
    """One policy under one seed, summed over the rollouts in a row."""

    makespans: list[float] = field(default_factory=list)  # of each rollout
    busy: float = 0.0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    steps: Counter[int] = field(default_factory=Counter)  # by draft length
    seconds: dict[int, float] = field(default_factory=dict)  # by draft length
    by_batch: dict[int, list[int]] = field(default_factory=dict)  # batch up to -> steps, sum of draft lengths
    drafting: int = 0  # requests in steps that drafted, summed
    accepted: int = 0  # tokens committed in those
    timeline: list[Row] = field(default_factory=list)  # of the last rollout
    described: dict[str, object] = field(default_factory=dict)

    @property
    def makespan(self) -> float:
        return sum(self.makespans) / len(self.makespans)

    def add(self, run: Run, work: Work) -> None:
        sizes, gammas = np.asarray(run.sizes), np.asarray(run.gammas)
        seconds, committed = np.asarray(run.seconds), np.asarray(run.committed)
        self.makespans.append(run.makespan)
        self.busy += run.busy
        self.tokens += sum(work.lengths)
        self.latencies += run.latencies
        for gamma in np.unique(gammas).tolist():
            self.steps[gamma] += int((gammas == gamma).sum())
            self.seconds[gamma] = self.seconds.get(gamma, 0.0) + float(seconds[gammas == gamma].sum())
        bins = 2 ** np.ceil(np.log2(sizes)).astype(int)
        for top in np.unique(bins).tolist():
            steps, total = self.by_batch.get(top, [0, 0])
            chosen = gammas[bins == top]
            self.by_batch[top] = [steps + len(chosen), total + int(chosen.sum())]
        self.drafting += int(sizes[gammas > 0].sum())
        self.accepted += int(committed[gammas > 0].sum())


Samples = dict[str, list[Sample]]  # policy -> one per seed


def check(plan: Plan) -> None:
    """Raises ValueError for a policy that cannot be, before anything runs."""
    for name in plan.all_policies():
        make(name, plan.options, Truth())


def run(plan: Plan, tell: Callable[[str], None] = lambda text: None) -> Samples:
    """Every policy on every seed. What a policy raises is raised here."""
    names = plan.all_policies()
    samples: Samples = {name: [] for name in names}
    for seed in range(plan.seeds):
        works = [_work(plan, seed, rollout) for rollout in range(plan.rollouts)]
        for name in names:
            tell(f"seed {seed + 1} of {plan.seeds}: {name}")
            samples[name].append(_sample(plan, name, works))
    return samples


def _work(plan: Plan, seed: int, rollout: int) -> tuple[Work, Luck, int]:
    own = seed + _SEED_STRIDE * rollout
    work = make_work(plan.lengths, plan.requests, plan.prompt, plan.arrivals, own)
    return work, Luck(plan.acceptance, work.lengths, plan.table.gamma_max, own), own


def _sample(plan: Plan, name: str, works: Sequence[tuple[Work, Luck, int]]) -> Sample:
    truth, sample = Truth(), Sample()
    policy = make(name, plan.options, truth)
    change_after = None if plan.acceptance.change is None else plan.acceptance.change[1]
    for rollout, (work, luck, seed) in enumerate(works):
        if rollout:
            policy.weights_changed()  # training was between
        run = simulate(work, luck, plan.table, policy, plan.engine, seed, truth, change_after)
        sample.add(run, work)
        sample.timeline = timeline(run)
    sample.described = dict(policy.describe())
    return sample


def timeline(run: Run, rows: int = TIMELINE_ROWS) -> list[Row]:
    """Equal intervals of the rollout; a step counts where it began."""
    width = run.makespan / rows
    place = np.minimum((np.asarray(run.started) / width).astype(int), rows - 1)
    gammas, sizes, committed = np.asarray(run.gammas), np.asarray(run.sizes), np.asarray(run.committed)
    found = []
    for row in range(rows):
        here = np.flatnonzero(place == row)
        gamma = round(float(gammas[here].mean()), 3) if len(here) else None
        active = int(sizes[here[-1]]) if len(here) else 0
        pace = round(float(committed[here].sum()) / width, 2)
        found.append(Row(round((row + 1) * width, 3), active, gamma, pace))
    return found


@dataclass(frozen=True)
class Against:
    """A policy's makespan compared with another's, seed by seed. `saved`: share of the other's."""

    seconds: MeanInterval
    saved: MeanInterval


def against(samples: Samples, name: str, other: str) -> Against:
    pairs = [(mine.makespan, theirs.makespan) for mine, theirs in zip(samples[name], samples[other], strict=True)]
    return Against(
        mean_interval([mine - theirs for mine, theirs in pairs]),
        mean_interval([1 - mine / theirs for mine, theirs in pairs]),
    )
