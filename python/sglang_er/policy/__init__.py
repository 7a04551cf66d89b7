"""How many tokens to draft: one interface (`base`), one file per policy. Pure Python: no torch, no sglang."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sglang_er.policy.acceptance import TRACKED_ROWS
from sglang_er.policy.base import Policy, StepOutcome, StepState
from sglang_er.policy.cycle import CyclePolicy
from sglang_er.policy.fixed import FixedPolicy
from sglang_er.policy.goodput import GoodputPolicy, Objective
from sglang_er.policy.threshold import ThresholdPolicy

__all__ = ["TRACKED_ROWS", "GoodputPolicy", "Policy", "PolicySettings", "StepOutcome", "StepState", "make_policy"]


class PolicySettings(Protocol):
    """The part of the configuration that policies need."""

    @property
    def policy(self) -> str: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def gamma_max(self) -> int: ...
    @property
    def gamma(self) -> int: ...
    @property
    def thresholds(self) -> Sequence[tuple[int, int]]: ...
    @property
    def gamma_schedule(self) -> Sequence[int] | None: ...


def make_policy(settings: PolicySettings, learnt: GoodputPolicy | None = None) -> Policy:
    """The policy of these settings; goodput is `learnt`, with what it knows, where there is one."""
    if settings.policy == "goodput":
        policy = GoodputPolicy(settings.gamma_max) if learnt is None else learnt
        policy.objective = settings.objective
        return policy
    if settings.policy == "fixed":
        return FixedPolicy(settings.gamma)
    if settings.policy == "threshold":
        return ThresholdPolicy(settings.thresholds)
    if settings.policy == "cycle" and settings.gamma_schedule:
        return CyclePolicy(settings.gamma_schedule)
    raise ValueError(f"no policy {settings.policy!r} with gamma_schedule={settings.gamma_schedule!r}")
