"""Permutation tests within prompts: the level is held, differences are seen, prompts are no difference."""

from __future__ import annotations

import numpy as np
import pytest
from grpo.permutation import holm, permutation_p, within_ranks


def test_ranks_are_within_the_prompt_and_ties_share_the_mean():
    found = within_ranks(np.array([[3.0, 1.0, 1.0, 9.0], [5.0, 5.0, 5.0, 5.0]]))
    assert found.tolist() == [[2.0, 0.5, 0.5, 3.0], [1.5, 1.5, 1.5, 1.5]]


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_the_level_is_held_whatever_the_ties(levels):
    rng = np.random.default_rng(levels)
    found = [
        permutation_p(rng.integers(0, levels, (8, 12)), rng.integers(0, levels, (8, 12)), 199, seed)
        for seed in range(200)
    ]
    # 10 of 200 expected; 22 has a chance of 4e-4.
    assert sum(value <= 0.05 for value in found) < 22
    assert min(found) >= 1 / 200


def test_prompts_that_differ_from_each_other_hide_nothing():
    rng = np.random.default_rng(3)
    level = 100.0 * rng.normal(size=(64, 1))
    plain, same = (level + rng.normal(size=(64, 32)) for _ in range(2))
    assert permutation_p(plain, same, 499) > 0.01
    assert permutation_p(plain, same + 0.3, 499) == 1 / 500


def test_a_difference_in_spread_alone_is_seen():
    rng = np.random.default_rng(4)
    assert permutation_p(rng.normal(size=(64, 64)), 1.5 * rng.normal(size=(64, 64)), 499) == 1 / 500


def test_a_small_difference_of_success_is_seen_with_four_thousand_rollouts():
    rng = np.random.default_rng(5)
    chance = rng.uniform(0.5, 0.95, size=(64, 1))
    plain = (rng.random((64, 64)) < chance).astype(float)
    worse = (rng.random((64, 64)) < chance - 0.05).astype(float)
    assert permutation_p(plain, worse, 999) <= 0.002


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        permutation_p(np.zeros((2, 3)), np.zeros((2, 4)))


def test_holm_adjusts_step_by_step_and_never_downwards():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
