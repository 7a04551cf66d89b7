"""The bootstrap: a median between its bounds, which the spread widens; the same at every call."""

from __future__ import annotations

import random

from sglang_er.rollout.intervals import median_interval


def test_bounds_enclose_the_median_and_follow_the_spread():
    rng = random.Random(1)
    narrow = median_interval([1 + rng.gauss(0, 0.01) for _ in range(20)])
    wide = median_interval([1 + rng.gauss(0, 0.1) for _ in range(20)])
    assert narrow.low < narrow.median < narrow.high
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_one_value_is_its_own_interval_and_calls_agree():
    assert median_interval([2.0]).text() == "2.000 [2.000, 2.000]"
    assert median_interval([1.0, 2.0, 4.0]) == median_interval([1.0, 2.0, 4.0])


def test_the_interval_covers_the_true_median_nearly_as_often_as_it_says():
    """A percentile bootstrap of a median is a little short: .932 of 2000 trials; .89 is 3.7 deviations from that."""
    rng = random.Random(2)
    trials, covered = 500, 0
    for trial in range(trials):
        interval = median_interval([rng.gauss(0, 1) for _ in range(21)], resamples=400, seed=trial)
        covered += interval.low <= 0 <= interval.high
    assert 0.89 * trials <= covered <= 0.98 * trials
