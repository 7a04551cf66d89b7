"""Hypothesis: the alarm sees drafts that a weight update made useless, and nothing else.

Method: rows whose drafts are accepted with a known probability, seeded. Symptom of a bad rule: an alarm when the draft
length changes though acceptance did not, or none when accepted drafts vanish.
"""

from __future__ import annotations

import random

import pytest

from sglang_er.policy.health import LEAST_ROWS, RETRY_STEPS, DraftHealth

GAMMAS = (1, 3, 5, 7)


def run(health: DraftHealth, alpha: float, rows: int, seed: int = 0, gammas: tuple[int, ...] = GAMMAS) -> list[str]:
    """Steps of 8 rows with changing draft lengths; the alarms they raised. Steps that may not draft are plain."""
    rng = random.Random(seed)
    alarms = []
    for step in range(rows // 8):
        gamma = gammas[step % len(gammas)] if health.allows() else 0
        lens = []
        for _ in range(8 if gamma else 0):
            length = 1
            while length <= gamma and rng.random() < alpha:
                length += 1
            lens.append(length)
        if alarm := health.observe(gamma, lens):
            alarms.append(alarm)
    return alarms


def updated(before: float, after: float, rows: int = 2 * LEAST_ROWS, **fields: float) -> tuple[DraftHealth, list[str]]:
    health = DraftHealth(7, **fields)
    assert not run(health, before, 2000)
    for _ in range(3):  # one update is several calls
        health.weights_changed()
    return health, run(health, after, rows, seed=1)


@pytest.mark.parametrize(("before", "after"), [(0.8, 0.8), (0.8, 0.7), (0.3, 0.9), (0.5, 0.4)])
def test_ordinary_updates_raise_no_alarm(before: float, after: float) -> None:
    health, alarms = updated(before, after, rows=8000)
    assert not alarms and health.allows()


@pytest.mark.parametrize("after", [0.35, 0.01, 0.0])
def test_an_update_that_ruins_the_drafts(after: float) -> None:
    """However few are left: the update is the likely cause, and the alarm says so."""
    health, alarms = updated(0.8, after)
    assert len(alarms) == health.alarms == 1
    assert health.cause == "sync" and not health.allows()
    assert "before the last weight update" in alarms[0]


def test_another_draft_length_is_no_loss() -> None:
    """Drafts of 7 before the update and of 1 after it: fewer accepted drafts a step, the same acceptance."""
    health = DraftHealth(7)
    run(health, 0.8, 4000, gammas=(7,))
    health.weights_changed()
    assert not run(health, 0.8, 2 * LEAST_ROWS, gammas=(1,))


def test_a_slow_decline_is_left_to_the_draft_policy() -> None:
    health = DraftHealth(7)
    for alpha in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        assert not run(health, alpha, 4000)
        health.weights_changed()


def test_useless_drafts_need_no_update() -> None:
    health = DraftHealth(7)
    assert len(run(health, 0.0, LEAST_ROWS)) == 1
    assert health.cause == "useless"


def test_speculation_comes_back() -> None:
    """With the next update at once; without one after RETRY_STEPS, and a policy that stays harder is then accepted."""
    health, _ = updated(0.8, 0.35)
    health.weights_changed()
    assert health.allows() and health.cause is None

    health, _ = updated(0.8, 0.35)
    for _ in range(RETRY_STEPS):
        health.observe(0, [])
    assert health.allows()
    assert not run(health, 0.35, 4000)
    assert health.alarms == 1


def test_steps_under_way_do_not_count() -> None:
    """Overlap: a step or two of useless drafts arrive after the alarm."""
    health, _ = updated(0.8, 0.0)
    before = health.describe()
    assert health.observe(3, [1, 1, 1]) is None
    assert health.describe() == before


def test_switched_off() -> None:
    health, alarms = updated(0.8, 0.0, drop=0.0)
    assert not alarms and health.allows()
