"""Slopes over the steps of several runs, and how sure they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_er.rollout.intervals import t_quantile


@dataclass(frozen=True)
class Slope:
    """Change per step, with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """Zero is within the interval."""
        return self.low <= 0.0 <= self.high

    def text(self) -> str:
        return f"{self.value:+.5f} [{self.low:+.5f}, {self.high:+.5f}]"


def slope(runs: Sequence[Sequence[float]]) -> Slope:
    """Least squares with a level of its own for each run: one slope, noise from the residuals (Student's t)."""
    pairs: list[tuple[float, float]] = []
    for values in runs:
        middle, mean = (len(values) - 1) / 2, statistics.fmean(values)
        pairs += [(step - middle, value - mean) for step, value in enumerate(values)]
    spread = sum(x * x for x, _ in pairs)
    value = sum(x * y for x, y in pairs) / spread
    freedom = len(pairs) - len(runs) - 1
    error = math.sqrt(sum((y - value * x) ** 2 for x, y in pairs) / freedom / spread)
    half = t_quantile(freedom) * error
    return Slope(value, value - half, value + half)
