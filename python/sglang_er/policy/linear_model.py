"""Recursive Bayesian linear regression (a Kalman filter with a constant state), small and in plain Python.

y = x . w + noise. The covariance P of w starts at the prior P0 and shrinks with every observation:

    S = x' P x + R,   K = P x / S,   w += K (y - x . w),   P -= K x' P

(Rasmussen and Williams, Gaussian Processes for Machine Learning, section 2.1, in recursive form). Feature vectors are
sparse, pairs of index and value, no index twice: the costs below are of that order times the size.
"""

from __future__ import annotations

from collections.abc import Sequence

Features = Sequence[tuple[int, float]]
Matrix = list[list[float]]


class LinearModel:
    """`mean`: prior weights; `covariance`: their prior covariance, symmetric and positive. Only its lower triangle is
    kept: an update costs half as much."""

    def __init__(self, mean: Sequence[float], covariance: Matrix) -> None:
        self.mean = list(mean)
        self._prior_mean = list(mean)
        self._prior = [list(row[: index + 1]) for index, row in enumerate(covariance)]
        self.triangle = [list(row) for row in self._prior]

    def predict(self, features: Features) -> float:
        mean, total = self.mean, 0.0
        for index, value in features:
            total += value * mean[index]
        return total

    def expected(self, features: Features) -> float:
        """The prediction of the prior."""
        return sum(value * self._prior_mean[index] for index, value in features)

    def variance(self, features: Features) -> float:
        """Of the prediction, without the noise of an observation."""
        triangle, total = self.triangle, 0.0
        for place, (index, value) in enumerate(features):
            across = 0.5 * value * triangle[index][index]
            for column, other in features[:place]:
                across += other * (triangle[index][column] if column < index else triangle[column][index])
            total += value * across
        return max(2.0 * total, 0.0)

    def _row(self, index: int) -> list[float]:
        triangle = self.triangle
        return triangle[index] + [row[index] for row in triangle[index + 1 :]]

    def update(self, features: Features, error: float, noise: float) -> None:
        """`error`: observed minus predicted; `noise`: variance of the observation."""
        mean, triangle = self.mean, self.triangle
        gain = [0.0] * len(mean)
        for index, value in features:
            if value:
                gain = [entry + value * other for entry, other in zip(gain, self._row(index))]
        total = noise
        for index, value in features:
            total += value * gain[index]
        if total <= 0.0:
            return
        step = error / total
        for index, value in enumerate(gain):
            if value:
                mean[index] += value * step
                share = value / total
                # zip ends with the row, on the diagonal.
                triangle[index] = [entry - share * other for entry, other in zip(triangle[index], gain)]

    def relax(self, share: float) -> None:
        """Forget: the covariance goes back towards the prior's, and never beyond it."""
        kept = 1.0 - share
        self.triangle = [
            [kept * entry + share * prior for entry, prior in zip(row, prior_row)]
            for row, prior_row in zip(self.triangle, self._prior)
        ]

    def doubt(self, factor: float, share: float) -> None:
        """As `relax`, and all weights may be wrong by one common factor, with this deviation from 1."""
        self.relax(share)
        self.triangle = [
            [entry + factor**2 * one * other for entry, other in zip(row, self.mean)]
            for row, one in zip(self.triangle, self.mean)
        ]

    def age(self, share: float, level: float) -> None:
        """As `relax`, and the mean goes as far back, towards `level` times the prior's."""
        kept = 1.0 - share
        pull = share * level
        self.mean = [kept * value + pull * prior for value, prior in zip(self.mean, self._prior_mean)]
        self.relax(share)
