"""Recursive Bayesian linear regression (a Kalman filter with a constant state), small and in plain Python.

y = x . w + noise. The covariance P of w starts at the prior P0 and shrinks with every observation:

    S = x' P x + R,   K = P x / S,   w += K (y - x . w),   P -= K x' P

(Rasmussen and Williams, Gaussian Processes for Machine Learning, section 2.1, in recursive form). Feature vectors are
sparse, pairs of index and value: the costs below are of that order times the size.
"""

from __future__ import annotations

from collections.abc import Sequence

Features = Sequence[tuple[int, float]]
Matrix = list[list[float]]


class LinearModel:
    """`mean`: prior weights; `covariance`: their prior covariance, symmetric and positive."""

    def __init__(self, mean: Sequence[float], covariance: Matrix) -> None:
        self.mean = list(mean)
        self._prior_mean = list(mean)
        self._prior = [list(row) for row in covariance]
        self.covariance = [list(row) for row in covariance]

    def predict(self, features: Features) -> float:
        mean = self.mean
        return sum(value * mean[index] for index, value in features)

    def expected(self, features: Features) -> float:
        """The prediction of the prior."""
        return sum(value * self._prior_mean[index] for index, value in features)

    def variance(self, features: Features) -> float:
        """Of the prediction, without the noise of an observation."""
        total = 0.0
        for index, value in features:
            row = self.covariance[index]
            total += value * sum(other * row[column] for column, other in features)
        return max(total, 0.0)

    def update(self, features: Features, error: float, noise: float) -> None:
        """`error`: observed minus predicted; `noise`: variance of the observation."""
        covariance = self.covariance
        gain = [sum(value * row[index] for index, value in features) for row in covariance]
        total = noise + sum(value * gain[index] for index, value in features)
        if total <= 0.0:
            return
        step = error / total
        mean = self.mean
        for index, value in enumerate(gain):
            if value:
                mean[index] += value * step
                share, row = value / total, covariance[index]
                covariance[index] = [entry - share * other for entry, other in zip(row, gain)]

    def relax(self, share: float) -> None:
        """Forget: the covariance goes back towards the prior's, and never beyond it."""
        kept = 1.0 - share
        self.covariance = [
            [kept * entry + share * prior for entry, prior in zip(row, prior_row)]
            for row, prior_row in zip(self.covariance, self._prior)
        ]
