"""The policies of the simulator, by name; each is made here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_er.config import DEFAULT_THRESHOLDS
from sglang_er.policy import GoodputPolicy, Policy, StepOutcome, StepState, seeding
from sglang_er.policy.fixed import FixedPolicy
from sglang_er.policy.goodput import Objective
from sglang_er.policy.paper import LADDER, RAMP, PaperPolicy, Roofline
from sglang_er.policy.threshold import ThresholdPolicy
from sglang_er.rollout.costs import StepTable
from sglang_er.rollout.simulate import Truth

NAMES = "ar, fixed:G, threshold, paper, goodput, goodput:makespan, oracle"
# What the engine's start-up may take (`seed_seconds`).
SEED_SECONDS = 3.0
SEED_NOISE = 0.02


@dataclass(frozen=True)
class PolicyOptions:
    """What the policies need beyond their name. `seed_from`: costs that goodput is told about at start-up, as the
    engine's timing of a few forwards would; None lets it begin without. `seed_error`: factor on the draft passes among
    these, a start-up that is wrong about T_draft / T_ar."""

    gamma_max: int
    seed_from: StepTable | None = None
    seed_error: float = 1.0
    thresholds: Sequence[tuple[int, int]] = DEFAULT_THRESHOLDS
    roofline: Roofline | None = None
    paper_gamma: int = 7
    paper_ladder: Sequence[int] = LADDER
    paper_ramp: int = RAMP


class OraclePolicy:
    """The draft length with the most expected tokens per second of this step, from true costs and true acceptance.

    Myopic: it does not trade the pace of short responses against that of the longest, which ends the rollout.
    """

    def __init__(self, truth: Truth) -> None:
        self._truth = truth

    def choose(self, state: StepState) -> int:
        limit = state.gamma_limit
        return int(np.argmax(self._truth.expected_tokens(limit) / self._truth.cycle.array[: limit + 1]))

    def observe(self, outcome: StepOutcome) -> None:
        pass  # knows it all

    def weights_changed(self) -> None:
        pass

    def describe(self) -> dict[str, object]:
        return {"policy": "oracle"}


def make(name: str, options: PolicyOptions, truth: Truth) -> Policy:
    """A fresh policy. Raises ValueError with one line for a name or a choice that cannot be."""
    kind, _, value = name.partition(":")
    if kind == "fixed" and value:
        return FixedPolicy(_fixed_gamma(name, value, options.gamma_max))
    if kind == "goodput" and value in ("", "tokens", "makespan"):
        return _goodput("makespan" if value == "makespan" else "tokens", options)
    if value:
        raise ValueError(f"--policy {name}: must be one of {NAMES}")
    if name == "ar":
        return FixedPolicy(0)
    if name == "threshold":
        return ThresholdPolicy(options.thresholds)
    if name == "oracle":
        return OraclePolicy(truth)
    if name == "paper":
        return _paper(options)
    raise ValueError(f"--policy {name}: must be one of {NAMES}")


def _fixed_gamma(name: str, value: str, gamma_max: int) -> int:
    if not value.isdecimal() or int(value) > gamma_max:
        raise ValueError(f"--policy {name}: the draft length must be between 0 and {gamma_max}")
    return int(value)


def _paper(options: PolicyOptions) -> PaperPolicy:
    if options.roofline is None:
        raise ValueError("--policy paper needs the constants of its roofline: --paper-constants FILE")
    ladder = [gamma for gamma in options.paper_ladder if gamma <= options.gamma_max]
    return PaperPolicy(options.roofline, options.paper_gamma, ladder, options.paper_ramp)


def _goodput(objective: Objective, options: PolicyOptions) -> Policy:
    policy = GoodputPolicy(options.gamma_max, objective)
    if options.seed_from is not None:
        seeding.seed(policy.cost, _timings(options, options.seed_from))
    return policy


def _timings(options: PolicyOptions, table: StepTable) -> list[seeding.Timing]:
    """Those of the start-up, with the noise of a clock and the error of the start-up."""
    rng = np.random.default_rng(5)

    def measure(kind: str, size: int, gamma: int) -> float:
        cycle = table.at(size, seeding.CONTEXT)
        forwards = {
            "plain": cycle.seconds[0],
            "draft": options.seed_error * cycle.draft,
            "verify": cycle.seconds[gamma] - gamma * cycle.draft,
        }
        return forwards[kind] * float(np.exp(rng.normal(0.0, SEED_NOISE)))

    sizes = [size for size in seeding.SIZES if size <= table.costs.batch_max]
    return seeding.time_forwards(measure, sizes, table.gamma_max, SEED_SECONDS)
