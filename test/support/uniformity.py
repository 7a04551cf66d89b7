"""Tests of a distribution: p-values of many groups, judged together: a correct build fails once in 10,000 runs."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

FAMILY_LEVEL = 1e-4
MIN_EXPECTED = 10.0


class Family:
    """p-values that are judged together: Holm's procedure keeps the chance of any false alarm below `level`."""

    def __init__(self, level: float = FAMILY_LEVEL) -> None:
        self.level = level
        self.p_values: dict[str, float] = {}

    def add(self, name: str, p_value: float) -> None:
        assert name not in self.p_values, name
        assert 0.0 <= p_value <= 1.0, (name, p_value)
        self.p_values[name] = float(p_value)

    def rejected(self) -> dict[str, float]:
        """The hypotheses that Holm's procedure rejects, smallest p-value first."""
        found: dict[str, float] = {}
        ranked = sorted(self.p_values.items(), key=lambda item: item[1])
        for rank, (name, p_value) in enumerate(ranked):
            if p_value > self.level / (len(ranked) - rank):
                break
            found[name] = p_value
        return found

    def smallest(self) -> str:
        name = min(self.p_values, key=lambda key: self.p_values[key])
        return f"smallest of {len(self.p_values)} p-values: {self.p_values[name]:.3g} ({name})"


def chi2_p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's test of counts [K] against expected counts [K] (same total); rare cells are pooled.

    A count in a cell that expects nothing gives 0.
    """
    observed = counts.to(torch.float64).numpy()
    wanted = expected.to(torch.float64).numpy()
    if (observed[wanted == 0] > 0).any():
        return 0.0
    order = np.argsort(-wanted, kind="stable")
    observed, wanted = observed[order], wanted[order]
    kept = int((wanted >= MIN_EXPECTED).sum())
    cells_o, cells_w = list(observed[:kept]), list(wanted[:kept])
    rest_o, rest_w = observed[kept:].sum(), wanted[kept:].sum()
    if rest_w >= MIN_EXPECTED or not cells_w:
        cells_o.append(rest_o)
        cells_w.append(rest_w)
    else:
        cells_o[-1] += rest_o
        cells_w[-1] += rest_w
    if len(cells_w) < 2:
        return 1.0
    statistic = sum((o - w) ** 2 / w for o, w in zip(cells_o, cells_w, strict=True))
    return float(stats.chi2.sf(statistic, len(cells_w) - 1))


def binomial_p_value(successes: int, trials: int, probability: float) -> float:
    """Two-sided exact test that `successes` of `trials` happened with `probability`."""
    return float(stats.binomtest(successes, trials, min(1.0, max(0.0, probability))).pvalue)


def poisson_excess_p_value(count: int, expected: float) -> float:
    """Chance of at least `count` events when `expected` are due."""
    return float(stats.poisson.sf(count - 1, expected))


def pit(probs: torch.Tensor, tokens: torch.Tensor, coins: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Randomized probability integral transform of tokens [N] against probs [N, V] -> [N] in [0, 1].

    Uniform and independent from token to token if every token was drawn from its row of `probs`, whatever `order`
    [N, V] is, as long as it does not depend on the token: order ranks the vocabulary, largest first, and decides
    only against which errors the test is strong. coins [N] are uniform and drawn by the caller.
    """
    probs = probs.to(torch.float64)
    index = tokens[:, None]
    own = order.gather(1, index)
    columns = torch.arange(order.shape[1])[None, :]
    ahead = (order > own) | ((order == own) & (columns < index))
    before = (probs * ahead).sum(dim=1)
    return ((before + coins * probs.gather(1, index).squeeze(1)) / probs.sum(dim=1)).clamp(0.0, 1.0)


def uniform_p_value(values: torch.Tensor) -> float:
    """Kolmogorov-Smirnov test that the values are uniform on [0, 1]."""
    return float(stats.kstest(values.numpy(), "uniform").pvalue)
