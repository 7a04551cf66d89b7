"""Counters of the engine: differences of totals, sums of differences, and what follows from them."""

from __future__ import annotations

import pytest

from sglang_er.rollout.steps import Steps

STATE = {
    "steps": {
        "steps_by_gamma": {"0": 5, "2": 3},
        "request_steps": 11,
        "committed_tokens": 20,
        "accepted_drafts": 6,
        "speculating_request_steps": 6,
        "drafted_at": [6, 4],
        "accepted_at": [4, 2],
        "costs": {"1": {"0": {"steps": 5, "seconds": 0.5}}, "2": {"2": {"steps": 3, "seconds": 0.9}}},
    }
}


def steps(gamma: int, count: int) -> Steps:
    return Steps({gamma: count}, count, count, 0, 0)


def test_counters_are_differences_of_totals_and_drop_lengths_that_did_not_occur():
    earlier = Steps({0: 5, 3: 2}, 7, 20, 4, 2)
    later = Steps({0: 5, 3: 6, 5: 1}, 12, 40, 13, 7)
    assert later.since(earlier) == Steps({3: 4, 5: 1}, 5, 20, 9, 5)


def test_accept_length_counts_the_bonus_token_and_needs_a_step_that_drafted():
    assert Steps({3: 4}, 4, 12, 8, 4).accept_length == 3.0
    assert steps(0, 4).accept_length is None
    assert (steps(0, 4) + Steps({3: 4}, 4, 12, 8, 4)).tokens_per_step == 2.0


def test_acceptance_and_costs_of_a_state_are_differences_too():
    total = Steps.total(STATE)
    assert total.alpha == 0.6 and total.alpha_by_offset == [pytest.approx(2 / 3), 0.5]
    assert total.costs == {(1, 0): (5, 0.5), (2, 2): (3, 0.9)}
    earlier = Steps({0: 5}, 5, 5, 2, 2, {0: 2}, {0: 2}, {(1, 0): 5}, {(1, 0): 0.5})
    later = total.since(earlier)
    assert later.costs == {(2, 2): (3, 0.9)}
    assert later.alpha_by_offset == [0.5, 0.5]
    assert later + earlier == total
    assert Steps.none() + total == total and total.since(total) == Steps.none()


def test_an_engine_that_reports_no_costs_can_still_be_measured():
    old = {"steps": {k: v for k, v in STATE["steps"].items() if k not in ("costs", "drafted_at", "accepted_at")}}
    assert Steps.total(old).costs == {} and Steps.total(old).alpha is None
