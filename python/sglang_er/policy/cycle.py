"""A list of draft lengths, one per step, over and over: shows that the draft length is free to change every step."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_er.policy.base import StepOutcome, StepState, clip


class CyclePolicy:
    def __init__(self, schedule: Sequence[int]) -> None:
        self._schedule = tuple(schedule)
        self._steps = 0

    def choose(self, state: StepState) -> int:
        gamma = self._schedule[self._steps % len(self._schedule)]
        self._steps += 1
        return clip(gamma, state)

    def observe(self, outcome: StepOutcome) -> None:
        pass  # the schedule is followed whatever happens

    def weights_changed(self) -> None:
        pass  # nothing was learnt

    def describe(self) -> dict[str, object]:
        return {"policy": "cycle", "gamma_schedule": list(self._schedule), "steps": self._steps}
