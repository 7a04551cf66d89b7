"""Whether two samples of rollouts differ: permutation tests within prompts, judged together.

Both sides answered the same prompts equally often. If they sample from one distribution, which side a response of a
prompt came from is exchangeable; so a statistic's p-value is its rank among random exchanges of the labels, prompt by
prompt. Exact for any statistic, without assumptions on distributions (Good 2005, chapter 3).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: Exchanges; the smallest p-value is 1 over one more.
PERMUTATIONS = 9_999


def within_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks 0..n-1 within each row of `values` [prompts, n], ties at the mean: what the prompt decides is taken out."""
    order = np.sort(values, axis=1)
    low = np.stack([np.searchsorted(row, found, side="left") for row, found in zip(order, values)])
    high = np.stack([np.searchsorted(row, found, side="right") for row, found in zip(order, values)])
    return (low + high - 1) / 2.0


def permutation_p(plain: np.ndarray, other: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """p-value of `plain` and `other` [prompts, samples] coming from one distribution per prompt.

    The statistic is the largest distance between the distribution functions of both sides' ranks within prompts: it
    sees any difference, and of values that are 0 or 1 it is about the difference of their means. Raises ValueError
    where the shapes differ.
    """
    if plain.shape != other.shape or plain.ndim != 2:
        raise ValueError(f"both sides must be [prompts, samples] of one shape, got {plain.shape} and {other.shape}")
    prompts, samples = plain.shape
    # Twice the rank is an integer, ties included.
    bins = (2 * within_ranks(np.concatenate([plain, other], axis=1))).astype(np.int64)
    total = np.bincount(bins.ravel())

    def distance(chosen: np.ndarray) -> int:
        """Of a choice [prompts, samples] of columns as one side: the largest difference of counts up to a rank."""
        counts = np.bincount(np.take_along_axis(bins, chosen, axis=1).ravel(), minlength=len(total))
        return int(np.abs(np.cumsum(2 * counts - total)).max())

    rng = np.random.default_rng(seed)
    found = distance(np.tile(np.arange(samples), (prompts, 1)))
    as_large = sum(
        distance(np.argpartition(rng.random(bins.shape), samples - 1, axis=1)[:, :samples]) >= found
        for _ in range(permutations)
    )
    return (as_large + 1) / (permutations + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: reject those at or below the family-wise level."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * value))
        adjusted[name] = largest
    return adjusted
