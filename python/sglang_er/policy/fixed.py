"""The same draft length at every step."""

from __future__ import annotations

from sglang_er.policy.base import StepOutcome, StepState, clip


class FixedPolicy:
    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    def choose(self, state: StepState) -> int:
        return clip(self._gamma, state)

    def observe(self, outcome: StepOutcome) -> None:
        pass  # nothing that happens changes a fixed draft length

    def weights_changed(self) -> None:
        pass  # nothing was learnt

    def describe(self) -> dict[str, object]:
        return {"policy": "fixed", "gamma": self._gamma}
