"""Slopes over runs that start at levels of their own."""

from __future__ import annotations

import random

import pytest
from grpo.trend import slope


def noisy(level: float, per_step: float, seed: int, steps: int = 30) -> list[float]:
    rng = random.Random(seed)
    return [level + per_step * step + rng.gauss(0.0, 0.02) for step in range(steps)]


def test_the_slope_is_found_and_its_interval_covers_it():
    found = slope([noisy(level, -0.004, seed) for seed, level in enumerate((4.9, 4.5, 3.0))])
    assert found.low < -0.004 < found.high < 0.0
    assert found.value == pytest.approx(-0.004, abs=0.0005)
    assert not found.flat


def test_noise_without_a_slope_is_flat_most_of_the_time():
    flat = [slope([noisy(1.0, 0.0, 100 * trial + seed) for seed in range(3)]).flat for trial in range(200)]
    # 190 of 200 expected.
    assert 178 <= sum(flat) <= 199


def test_other_levels_are_no_slope():
    runs = [[level] * 10 for level in (1.0, 2.0, 3.0)]
    assert slope(runs).value == 0.0
