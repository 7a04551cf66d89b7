"""What trying another draft length may cost, and when a plain step is due."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise

import pytest
from support.pretended_engine import GAMMA_MAX, Engine

from sglang_er.policy import GoodputPolicy
from sglang_er.policy.probes import PlainChecks, Probe, ProbeBudget, Tried


def budget() -> ProbeBudget:
    made = ProbeBudget(0.004)
    made.begin(0.05)
    return made


def test_a_probe_pays_what_it_lost():
    made = budget()
    first = made.seconds
    made.pay(Probe(8, 3, 0.010, 0.100))
    assert made.seconds == pytest.approx(first - 0.010)
    made.settle(8, 3, 0.135)
    assert made.seconds == pytest.approx(first - 0.035)
    made.settle(8, 3, 0.135)  # another step, not the probe
    assert made.seconds == pytest.approx(first - 0.035) and made.probes == 1


def test_a_probe_that_won_costs_nothing():
    made = budget()
    first = made.seconds
    made.pay(Probe(8, 3, 0.010, 0.100))
    made.settle(8, 3, 0.080)
    assert made.seconds == pytest.approx(first)


@pytest.mark.parametrize("seconds", [1e6, math.inf, math.nan])
def test_a_disturbed_probe_ends_probing_for_a_while_and_not_for_ever(seconds: float):
    made = budget()
    first = made.seconds
    made.pay(Probe(8, 3, 0.010, 0.100))
    made.settle(8, 3, seconds)
    assert -first <= made.seconds < first
    for _ in range(2000):
        made.earn(0.05, 0.05)
    assert 0.0 < made.seconds < 10.0


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_plain_steps_are_due_ever_more_rarely(lag: int):
    """Also where steps are known some steps after they were chosen."""
    checks, due, running = PlainChecks(), list[int](), deque[bool]()
    for step in range(600):
        drafts = not checks.due(8, 1.2)
        if not drafts:
            due.append(step)
            checks.spend(8)
        running.append(drafts)
        if len(running) > lag:
            (checks.drafted if running.popleft() else checks.plain)(8)
    gaps = [after - before - lag for before, after in pairwise(due)]
    assert due[0] == PlainChecks.FIRST + lag
    assert gaps == [gap + 1 for gap in (12, 36, 108, *[PlainChecks.LONGEST] * (len(gaps) - 3))] and len(gaps) >= 5


def test_batches_of_another_size_and_clear_gains_are_another_matter():
    checks = PlainChecks()
    for _ in range(PlainChecks.FIRST):
        checks.drafted(8)
    assert checks.due(9, 1.2) and not checks.due(2, 1.2) and not checks.due(8, 2.5)


def test_plain_decode_is_measured_where_every_step_drafts():
    """The gain that is reported, and the guard, rest on it."""
    engine = Engine(GoodputPolicy(GAMMA_MAX), alpha=0.9, draft=0.3)
    chosen = engine.run(8, 400)
    assert chosen[0] >= 4
    before = engine.policy.cost.observed["plain"]
    assert engine.run(8, 400)[0] >= 2 and engine.policy.cost.observed["plain"] > before


def test_a_draft_length_that_was_not_tried_for_long_is_told_by_size_of_batch():
    tried = Tried(gamma_max=3)
    for _ in range(Tried.LONG_AGO - 1):
        tried.step(8, 2)
    assert not any(tried.long_ago(8, gamma) for gamma in range(4))
    tried.step(15, 2)  # of the same size as 8, as far as this is concerned
    assert [tried.long_ago(8, gamma) for gamma in range(4)] == [True, True, False, True]
    assert not any(tried.long_ago(16, gamma) for gamma in range(4))
    tried.step(9, 3)
    assert [tried.long_ago(8, gamma) for gamma in range(4)] == [True, True, False, False]
