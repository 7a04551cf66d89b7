"""Draft length by batch size: a small batch leaves arithmetic idle that a long verify pass can use."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from sglang_er.policy.base import StepOutcome, StepState, clip


class ThresholdPolicy:
    """`thresholds` are (largest batch size, gamma) by rising batch size; above the last one nothing is drafted."""

    def __init__(self, thresholds: Sequence[tuple[int, int]]) -> None:
        self._batch_sizes = [batch_size for batch_size, _ in thresholds]
        self._gammas = [gamma for _, gamma in thresholds]

    def choose(self, state: StepState) -> int:
        bin_of_batch = bisect_left(self._batch_sizes, state.batch_size)
        return clip(self._gammas[bin_of_batch], state) if bin_of_batch < len(self._gammas) else 0

    def observe(self, outcome: StepOutcome) -> None:
        pass  # thresholds are the user's; the measured choice is another policy

    def weights_changed(self) -> None:
        pass  # nothing was learnt

    def describe(self) -> dict[str, object]:
        return {"policy": "threshold", "thresholds": list(zip(self._batch_sizes, self._gammas))}
