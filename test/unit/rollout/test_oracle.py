"""The yardstick's arithmetic: paces, interpolation, makespans, and the share of the saving that was reached."""

from __future__ import annotations

import pytest

from sglang_er.rollout import oracle
from sglang_er.rollout.oracle import CostModel

# Drafting three costs twice a plain step for one request and six times for eight.
COSTS = {(1, 0): (10, 10.0), (8, 0): (10, 17.0), (1, 3): (10, 20.0), (8, 3): (10, 60.0)}


def test_expected_tokens_multiply_the_acceptances_before_and_go_on_with_the_last():
    assert oracle.expected_tokens(0, [0.9]) == 1.0
    assert oracle.expected_tokens(2, [0.5, 0.5]) == 1.75
    assert oracle.expected_tokens(3, [0.5]) == 1.875
    assert oracle.expected_tokens(3, []) == 1.0


def test_costs_rise_with_the_batch_size_whatever_was_measured():
    assert oracle.rising([(1, 1.0, 1.0), (2, 3.0, 1.0), (4, 2.0, 3.0), (8, 5.0, 1.0)]) == [
        (1, 1.0), (2, 2.25), (4, 2.25), (8, 5.0)
    ]  # fmt: skip


def test_sizes_between_are_interpolated_and_nothing_is_made_up_beyond():
    model = CostModel(COSTS)
    assert model.seconds(1, 0) == 1.0 and model.seconds(8, 3) == 6.0
    assert model.seconds(4, 0) == pytest.approx(1.3)
    assert model.seconds(9, 0) is None and model.seconds(4, 5) is None


def test_a_size_with_hardly_any_steps_is_not_believed():
    model = CostModel({**COSTS, (4, 0): (oracle.LEAST_STEPS - 1, 100.0)})
    assert model.seconds(4, 0) == pytest.approx(1.3)


def test_the_best_choice_weighs_cost_against_tokens():
    model = CostModel(COSTS)
    alone, together = (model.best(size, [0.9]) for size in (1, 8))
    assert alone is not None and alone.gamma == 3
    assert alone.seconds_per_token == pytest.approx(2.0 / (1 + 0.9 + 0.81 + 0.729))
    assert together is not None and together.gamma == 0
    poor = model.best(1, [0.2])
    assert poor is not None and poor.gamma == 0
    assert model.best(99, [0.9]) is None


def test_makespan_counts_every_token_at_the_batch_that_runs():
    # 10 tokens with three, 10 with two, 20 with one
    assert oracle.makespan([10, 40, 20], 3, float) == 10 * 3 + 10 * 2 + 20 * 1
    # two in flight: 10 ends, 20 follows and ends at 30, then 40 has 10 left alone
    assert oracle.makespan([10, 40, 20], 2, float) == 30 * 2 + 10 * 1
    assert oracle.makespan([5, 5], 2, float) == 10


def test_the_share_compares_seconds_saved_with_those_the_oracle_saves():
    found = oracle.saving([[10, 40]], 2, {**COSTS, (2, 0): (10, 11.0), (2, 3): (10, 30.0)}, [1.0], 50.0, 35.0)
    assert found is not None
    assert found.gammas == {1: 3, 2: 3}
    assert found.plain_computed == pytest.approx(10 * 1.1 + 30 * 1.0)
    assert found.oracle_computed == pytest.approx(10 * 0.75 + 30 * 0.5)
    assert found.share == pytest.approx(15 / 18.5)


def test_unknown_costs_give_no_figure_and_nothing_to_save_no_share():
    assert oracle.saving([[10] * 9], 9, COSTS, [0.9], 10.0, 9.0) is None
    useless = oracle.saving([[10]], 1, COSTS, [0.1], 10.0, 10.0)
    assert useless is not None and useless.share is None and useless.gammas == {1: 0}
