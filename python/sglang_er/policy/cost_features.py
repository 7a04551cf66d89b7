"""What a forward pass's cost is a linear function of, and what is believed of it before the first step.

`cost_model` has the formula. Weights of the target's model: f at KNOTS, a, b; then e at EXTRA_KNOTS, c, d, which only
verify passes have. The draft's model has f, a and b.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from sglang_er.policy.linear_model import LinearModel, Matrix

# Rows; denser where graph buckets and kernels' tiles make steps. Beyond the last, the last slope continues.
KNOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 768, 1024, 2048, 4096)
_CONTEXT, _MEAN_CONTEXT = len(KNOTS), len(KNOTS) + 1
# Of the target's model, what only verify passes have.
EXTRA_KNOTS = (1, 8, 64, 512)
_EXTRA = len(KNOTS) + 2
_EXTRA_CONTEXT, _EXTRA_MEAN_CONTEXT = _EXTRA + len(EXTRA_KNOTS), _EXTRA + len(EXTRA_KNOTS) + 1
_CONTEXT_UNIT, _MEAN_CONTEXT_UNIT = 65536.0, 4096.0


class Step(NamedTuple):
    """What a step's cost depends on: requests, and their committed tokens in all."""

    rows: int
    context: int


class _Shape(NamedTuple):
    """A prior in units of a plain step: level, its deviation, and the rows that add one more level."""

    level: float
    deviation: float
    knee: float


# In units of level / knee: deviation of the first slope, and of its change from a knot to the next; in levels: a step.
_SLOPE, _BEND, _STEP = 2.5, 0.5, 0.03
_TARGET, _DRAFT, _VERIFY_EXTRA = _Shape(1.0, 0.3, 128.0), _Shape(0.35, 0.3, 64.0), _Shape(0.05, 0.1, 64.0)


def _between(knots: tuple[int, ...], first: int, rows: int) -> list[tuple[int, float]]:
    """The two knots around `rows` with their shares; beyond the ends the outer straight line goes on."""
    above = min(max(bisect_right(knots, rows), 1), len(knots) - 1)
    low, high = knots[above - 1], knots[above]
    share = (rows - low) / (high - low)
    return [(first + above - 1, 1.0 - share), (first + above, share)]


def features_of(rows: int, step: Step) -> list[tuple[int, float]]:
    features = _between(KNOTS, 0, rows)
    features.append((_CONTEXT, step.context / _CONTEXT_UNIT))
    features.append((_MEAN_CONTEXT, step.context / max(step.rows, 1) / _MEAN_CONTEXT_UNIT))
    return features


def verify_features(step: Step, gamma: int) -> list[tuple[int, float]]:
    rows = step.rows * (gamma + 1)
    features = features_of(rows, step)
    extra = _between(EXTRA_KNOTS, _EXTRA, rows)
    return [*features, *extra, (_EXTRA_CONTEXT, features[2][1]), (_EXTRA_MEAN_CONTEXT, features[3][1])]


def _value(knots: tuple[int, ...], values: Sequence[float], rows: int) -> float:
    """What `_between` says of these values at the knots."""
    above = min(max(bisect_right(knots, rows), 1), len(knots) - 1)
    low, below = knots[above - 1], values[above - 1]
    return below + (rows - low) / (knots[above] - low) * (values[above] - below)


def verify_at(weights: Sequence[float], step: Step, gammas: Iterable[int]) -> list[float]:
    """The weights' sum over `verify_features` for each of these draft lengths, without the features."""
    whole, mean = step.context / _CONTEXT_UNIT, step.context / max(step.rows, 1) / _MEAN_CONTEXT_UNIT
    contexts = whole * (weights[_CONTEXT] + weights[_EXTRA_CONTEXT])
    contexts += mean * (weights[_MEAN_CONTEXT] + weights[_EXTRA_MEAN_CONTEXT])
    extra, found = weights[_EXTRA:_EXTRA_CONTEXT], []
    for gamma in gammas:
        rows = step.rows * (gamma + 1)
        found.append(_value(KNOTS, weights, rows) + _value(EXTRA_KNOTS, extra, rows) + contexts)
    return found


def _walk(shape: _Shape, knots: tuple[int, ...]) -> tuple[list[float], Matrix]:
    """f(n) = level (1 + (n - 1) / knee), as a local linear trend: every knot is the one before it, plus a slope that
    changes little from knot to knot, plus a step of its own. Then the contexts.

    The slope is what makes the roofline go on behind the last measured knot (Harvey 1989, section 2.3).
    """
    size = len(knots) + 2
    mean = [shape.level * (1.0 + (rows - 1) / shape.knee) for rows in knots]
    # Loadings on independent causes of variance 1.
    slope, at = [0.0, _SLOPE * shape.level / shape.knee], [shape.deviation, 0.0]
    roots = [list(at)]
    for below, rows in pairwise(knots):
        at = [value + (rows - below) * share for value, share in zip(at, slope)]
        at.append(_STEP * shape.level)
        slope.append(0.0)
        roots.append(list(at))
        at.append(0.0)
        slope.append(_BEND * shape.level / shape.knee)
    covariance = [[sum(a * b for a, b in zip(one, other)) for other in roots] for one in roots]
    for row in covariance:
        row += [0.0, 0.0]
    covariance += [[0.0] * size, [0.0] * size]
    mean += [0.1 * shape.level, 0.02 * shape.level]
    covariance[-2][-2], covariance[-1][-1] = (0.3 * shape.level) ** 2, (0.15 * shape.level) ** 2
    return mean, covariance


def draft_prior() -> LinearModel:
    return LinearModel(*_walk(_DRAFT, KNOTS))


def target_prior() -> LinearModel:
    mean, covariance = _walk(_TARGET, KNOTS)
    extra_mean, extra = _walk(_VERIFY_EXTRA, EXTRA_KNOTS)
    extra[-2][-2], extra[-1][-1] = 0.1**2, 0.1**2
    rows = [[*row, *[0.0] * len(extra)] for row in covariance]
    return LinearModel([*mean, *extra_mean], rows + [[*[0.0] * len(covariance), *row] for row in extra])
