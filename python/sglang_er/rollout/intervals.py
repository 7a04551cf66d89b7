"""How sure a median is: the bootstrap. How sure a mean is: Student's t."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 10_000
LEVEL = 0.95
# The .975 quantile of Student's t for 1 to 9 degrees of freedom.
_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


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


@dataclass(frozen=True)
class MeanInterval:
    """A mean and the bounds of its `LEVEL` confidence interval (Student's t); None where there is one value only."""

    mean: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        def short(value: float | None) -> float | None:
            return None if value is None else float(f"{value:.6g}")

        return {"mean": short(self.mean), "low": short(self.low), "high": short(self.high)}


def mean_interval(values: Sequence[float]) -> MeanInterval:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return MeanInterval(mean, None, None)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return MeanInterval(mean, mean - half, mean + half)


def t_quantile(freedom: int) -> float:
    """The .975 quantile of Student's t: exact for few degrees of freedom, above them Fisher's expansion around the
    normal quantile z, which is within .0003 from 10 on."""
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
