"""The bootstrap: a median between its bounds, which the spread widens; the same at every call."""

from __future__ import annotations

import random

import pytest

from sglang_er.rollout.intervals import mean_interval, median_interval, t_quantile


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


def test_the_quantiles_of_t_are_those_of_the_tables():
    tables = {1: 12.7062, 4: 2.7764, 9: 2.2622, 10: 2.2281, 19: 2.0930, 60: 2.0003, 1000: 1.9623}
    assert {freedom: round(t_quantile(freedom), 4) for freedom in tables} == pytest.approx(tables, abs=0.0003)


def test_a_mean_of_one_value_has_no_bounds_and_of_several_has_those_of_t():
    assert mean_interval([2.0]).to_json() == {"mean": 2.0, "low": None, "high": None}
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.low, found.mean, found.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2.0, 2 + 4.3027 / 3**0.5))
