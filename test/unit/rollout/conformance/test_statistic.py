"""The statistic of C27 accepts draws from the distribution and rejects draws from a slightly sharper one."""

from __future__ import annotations

import math
import random

import pytest

from sglang_er.rollout.conformance.statistic import BINS, Uniformity, chi_square, filtered

PROBS = {3: 0.5, 9: 0.3, 4: 0.15, 1: 0.05}
DRAWS = 5000


def judged(weights: dict[int, float], seed: int) -> Uniformity:
    """Tokens drawn by `weights`, judged against PROBS."""
    rng, statistic = random.Random(seed), Uniformity(random.Random(seed + 1))
    for token in rng.choices(list(weights), list(weights.values()), k=DRAWS):
        statistic.add(PROBS, token, ("all",))
    return statistic


@pytest.mark.parametrize("seed", range(10))
def test_true_draws_pass(seed: int) -> None:
    assert not judged(PROBS, seed).rejected()


def test_sharper_draws_are_rejected() -> None:
    sharper = {token: mass**1.3 for token, mass in PROBS.items()}
    assert "all" in judged(sharper, 0).rejected()


def test_a_token_outside_the_filters_is_rejected_at_once() -> None:
    statistic = judged(PROBS, 0)
    statistic.add(PROBS, 77, ("all",))
    assert statistic.rejected() == {"impossible tokens": 0.0}


@pytest.mark.parametrize(
    ("statistic", "p_value"),
    # Tables: the upper 5 % and 1 % points of chi-square with 19 degrees of freedom.
    [(30.144, 0.05), (36.191, 0.01)],
)
def test_p_values_are_those_of_the_tables(statistic: float, p_value: float) -> None:
    expected = 1000.0
    off = math.sqrt(statistic * expected / 2)
    counts = [expected + off, expected - off, *[expected] * (BINS - 2)]
    assert chi_square(counts) == pytest.approx(p_value, rel=1e-3)


def test_both_meanings_of_top_p() -> None:
    """Of masses .5 .2 .1 (the rest is outside top_k): with top_p .75 the third stays unless the sum is renormalized."""
    top = [(math.log(mass), token) for token, mass in ((5, 0.5), (6, 0.2), (7, 0.1))]
    assert set(filtered(top, 0.75, first_k=False)) == {5, 6, 7}
    assert set(filtered(top, 0.75, first_k=True)) == {5, 6}
    assert sum(filtered(top, 0.75, first_k=True).values()) == pytest.approx(1.0)
