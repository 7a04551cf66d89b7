"""Counters attribute accept counts to the step, the draft length and the offset that they came from."""

from __future__ import annotations

import math

import pytest

from sglang_er.engine.stats import LaunchedStep, StepStats
from sglang_er.policy import StepState

STATE = StepState(batch_size=3, context_tokens=30, gamma_limit=7, speculative_rows=3)


def launched(gamma: int, speculating: list[int] | None) -> LaunchedStep:
    return LaunchedStep(STATE, gamma, speculating, host_seconds=0.1, seconds=0.2, draft_seconds=0.05)


def test_acceptance_by_offset_counts_only_drafts_that_were_verified():
    stats = StepStats()
    stats.launch_step(launched(3, None))
    outcome = stats.finish_step([0, 3, 1])
    assert outcome is not None and list(outcome.accept_lens) == [1, 4, 2]
    # offset 0: three verified, two kept; offset 1: two verified, one kept; offset 2: one verified, one kept
    assert [stats.drafted_at[i] for i in range(3)] == [3, 2, 1]
    assert [stats.accepted_at[i] for i in range(3)] == [2, 1, 1]
    assert stats.describe()["alpha"] == [pytest.approx(2 / 3, abs=1e-4), 0.5, 1.0]
    assert stats.describe()["accept_length"] == pytest.approx(7 / 3)


def test_results_belong_to_the_oldest_launched_step_and_its_speculating_rows():
    stats = StepStats()
    stats.launch_step(launched(2, [0, 2]))
    stats.launch_step(launched(0, None))
    outcome = stats.finish_step([2, 0, 1])
    assert list(outcome.accept_lens) == [3, 2]  # of the rows that drafted
    assert (outcome.seconds, outcome.draft_seconds) == (0.2, 0.05)
    assert (stats.drafted_tokens, stats.accepted_drafts, stats.speculating_request_steps) == (4, 3, 2)
    assert stats.finish_step([0, 0, 0]).gamma == 0
    assert (stats.request_steps, stats.committed_tokens) == (6, 9)
    assert stats.finish_step([0]) is None


def test_a_flush_forgets_steps_that_will_never_be_reported():
    stats = StepStats()
    stats.launch_step(launched(2, None))
    stats.forget_pending()
    assert stats.finish_step([1, 1, 1]) is None


def test_a_step_costs_the_time_since_the_forward_before_it_and_a_prefill_costs_none():
    stats = StepStats()
    assert math.isnan(stats.forward_ended(10.0, (4, 0)))  # nothing before it: unknown
    stats.forward_ended(100.0)
    for now, gamma in ((100.5, 3), (101.0, 3), (101.25, 0)):
        stats.forward_ended(now, (2, gamma))
    stats.forward_ended(500.0)
    assert stats.forward_ended(500.125, (1, 0)) == 0.125
    assert stats.describe()["costs"] == {
        "1": {"0": {"steps": 1, "seconds": 0.125}},
        "2": {"0": {"steps": 1, "seconds": 0.25}, "3": {"steps": 2, "seconds": 1.0}},
    }


def test_a_draft_forward_costs_its_share_of_the_draft_pass():
    stats = StepStats()
    stats.launch_step(launched(2, None))
    stats.launch_step(launched(3, None))
    stats.launch_step(launched(0, None)._replace(draft_seconds=math.nan))
    assert stats.describe()["draft_costs"] == {"3": {"forwards": 5, "seconds": 0.1}}


def test_acceptance_counts_are_there_for_clients_that_take_differences():
    stats = StepStats()
    stats.launch_step(launched(2, None))
    stats.finish_step([0, 2, 1])
    described = stats.describe()
    assert (described["drafted_at"], described["accepted_at"]) == ([3, 2], [2, 1])
