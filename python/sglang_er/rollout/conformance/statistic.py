"""Whether tokens were drawn from the distribution that the server itself reports for their positions.

A request with top_k = K and the K most likely logprobs returned tells the whole distribution of every token it got.
The randomized probability integral transform of the tokens is then uniform and independent; a chi-square test over
equal bins judges it, for all tokens and by position, with the chance of any false alarm held below LEVEL (Holm).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LEVEL = 1e-4
BINS = 20
POSITIONS = 4
# The smallest expected count of a bin that the chi-square distribution is good for.
LEAST_EXPECTED = 8.0


def filtered(top: Sequence[tuple[float, int]], top_p: float, first_k: bool) -> dict[int, float]:
    """token -> probability, from the logprobs of the top_k tokens, most likely first.

    `first_k`: top_p counts from the top_k tokens (as FlashInfer does), else from the whole vocabulary (as SGLang's
    torch sampler does). A token stays while those before it sum to at most top_p.
    """
    import math

    masses = [math.exp(value) for value, _ in top]
    if first_k:
        total = sum(masses)
        masses = [mass / total for mass in masses]
    kept: dict[int, float] = {}
    before = 0.0
    for mass, (_, token) in zip(masses, top):
        if before > top_p:
            break
        kept[token] = mass
        before += mass
    total = sum(kept.values())
    return {token: mass / total for token, mass in kept.items()}


@dataclass
class Uniformity:
    """Counts of the transform of every token, by group."""

    rng: random.Random = field(default_factory=lambda: random.Random(5))
    counts: dict[str, list[int]] = field(default_factory=dict)
    impossible: int = 0
    tokens: int = 0

    def add(self, probs: dict[int, float], token: int, groups: Iterable[str]) -> None:
        """One token; `probs` in the order that ranks the vocabulary."""
        coin = self.rng.random()
        self.tokens += 1
        if token not in probs:
            self.impossible += 1
            return
        before = 0.0
        for other, mass in probs.items():
            if other == token:
                break
            before += mass
        value = min(before + coin * probs[token], 1.0 - 1e-12)
        for group in groups:
            self.counts.setdefault(group, [0] * BINS)[int(value * BINS)] += 1

    def p_values(self) -> dict[str, float]:
        """Per group that is large enough."""
        return {
            name: chi_square(counts) for name, counts in self.counts.items() if sum(counts) / BINS >= LEAST_EXPECTED
        }

    def rejected(self) -> dict[str, float]:
        """What Holm's procedure rejects, smallest first; a token that cannot have been drawn rejects by itself."""
        found: dict[str, float] = {"impossible tokens": 0.0} if self.impossible else {}
        ranked = sorted(self.p_values().items(), key=lambda item: item[1])
        for rank, (name, value) in enumerate(ranked):
            if value > LEVEL / (len(ranked) - rank):
                break
            found[name] = value
        return found


def chi_square(counts: Sequence[int]) -> float:
    """p-value of equal expectations."""
    import torch

    expected = sum(counts) / len(counts)
    statistic = sum((count - expected) ** 2 for count in counts) / expected
    degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))
