"""The policies of the simulator, by name; each is made here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_er.config import DEFAULT_THRESHOLDS
from sglang_er.policy import FixedPolicy, Policy, StepOutcome, StepState, ThresholdPolicy
from sglang_er.policy.paper import LADDER, RAMP, PaperPolicy, Roofline
from sglang_er.rollout.simulate import Truth

NAMES = "ar, fixed:G, threshold, paper, goodput, oracle"


@dataclass(frozen=True)
class PolicyOptions:
    """What the policies need beyond their name."""

    gamma_max: int
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
    if value:
        raise ValueError(f"--policy {name}: only fixed takes a number")
    if name == "ar":
        return FixedPolicy(0)
    if name == "threshold":
        return ThresholdPolicy(options.thresholds)
    if name == "oracle":
        return OraclePolicy(truth)
    if name == "paper":
        return _paper(options)
    if name == "goodput":
        return _goodput(options)
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


def _goodput(options: PolicyOptions) -> Policy:
    try:
        from sglang_er.policy.goodput import GoodputPolicy
    except ModuleNotFoundError:
        raise ValueError("--policy goodput: this version of sglang_er has no such policy") from None
    policy: Policy = GoodputPolicy(gamma_max=options.gamma_max)
    return policy
