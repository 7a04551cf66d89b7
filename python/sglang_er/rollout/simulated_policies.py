"""The policies of the simulator, by name; each is made here and nowhere else."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_er.config import DEFAULT_THRESHOLDS
from sglang_er.policy import Policy, StepOutcome, StepState
from sglang_er.policy.fixed import FixedPolicy
from sglang_er.policy.paper import LADDER, RAMP, PaperPolicy, Roofline
from sglang_er.policy.threshold import ThresholdPolicy
from sglang_er.rollout.costs import StepTable
from sglang_er.rollout.simulate import Truth

NAMES = "ar, fixed:G, threshold, paper, goodput, goodput:makespan, oracle"
# What the engine times at start-up: these batch sizes, this draft length, so often.
SEED_SIZES, SEED_GAMMA, SEED_CONTEXT, SEED_REPEATS = (1, 4, 16, 64), 3, 64, 2
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
        return _goodput(value or "tokens", options)
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


def _goodput(objective: str, options: PolicyOptions) -> Policy:
    try:
        goodput = importlib.import_module("sglang_er.policy.goodput")
        cost_model = importlib.import_module("sglang_er.policy.cost_model")
    except ModuleNotFoundError:
        raise ValueError("--policy goodput: this version of sglang_er has no such policy") from None
    policy: Policy = goodput.GoodputPolicy(options.gamma_max, objective)
    if options.seed_from is not None:
        cost_model.seed(policy.cost, _timings(options, cost_model.Step))  # type: ignore[attr-defined]
    return policy


def _timings(options: PolicyOptions, step: Any) -> Iterator[tuple[str, Any, int, float]]:
    """(kind, step, gamma, seconds) of single forwards, with the noise of a clock and the error of the start-up."""
    table = options.seed_from
    assert table is not None
    rng = np.random.default_rng(5)
    gamma = min(SEED_GAMMA, table.gamma_max)
    for size in (size for size in SEED_SIZES if size <= table.costs.batch_max):
        cycle = table.at(size, SEED_CONTEXT)
        forwards = [("plain", 0, cycle.seconds[0]), ("draft", 0, options.seed_error * cycle.draft)]
        forwards.append(("verify", gamma, cycle.seconds[gamma] - gamma * cycle.draft))
        for kind, drafted, seconds in forwards * SEED_REPEATS if gamma else forwards[:1]:
            noisy = seconds * float(np.exp(rng.normal(0.0, SEED_NOISE)))
            yield kind, step(size, size * SEED_CONTEXT), drafted, noisy
