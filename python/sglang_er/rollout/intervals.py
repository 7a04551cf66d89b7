"""How sure a median is: the bootstrap."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A median and the bounds between which `LEVEL` of the resampled medians lie."""

    median: float
    low: float
    high: float

    def text(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_interval(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap of the median; the same at every call. One value has no spread to show.

    It is a little short: with 10, 21, 40 normal values it covered the true median in .928, .932, .943 of 2000 trials.
    """
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(resamples))
    cut = int(resamples * (1 - LEVEL) / 2)
    return Interval(statistics.median(values), medians[cut], medians[-1 - cut])
