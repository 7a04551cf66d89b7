"""The tracker estimates conditional acceptance by position, forgets, and never keeps what it does not need."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_er.policy.acceptance import PRIOR_ALPHA, TRACKED_ROWS, AcceptanceTracker


def accept_lens(alphas: list[float], gamma: int, rows: int, rng: random.Random) -> list[int]:
    lens = []
    for _ in range(rows):
        count = 1
        while count <= gamma and rng.random() < alphas[count - 1]:
            count += 1
        lens.append(count)
    return lens


def fed(alphas: list[float], gamma: int, steps: int, rows: int = 8, seed: int = 0) -> AcceptanceTracker:
    tracker, rng = AcceptanceTracker(7), random.Random(seed)
    for _ in range(steps):
        tracker.observe(gamma, accept_lens(alphas, gamma, rows, rng))
    return tracker


def test_acceptance_is_conditional_on_the_position_being_reached():
    alphas = [0.9, 0.8, 0.95, 0.7]
    found = fed(alphas, 4, steps=2000, rows=8).alphas()
    assert found[:4] == pytest.approx(alphas, abs=0.06)


def test_totals_are_exact():
    tracker = AcceptanceTracker(3)
    tracker.observe(3, [1, 4, 2])
    tracker.observe(2, [3])
    assert (tracker.drafted_at, tracker.accepted_at) == ([4, 3, 1], [3, 2, 1])


def test_positions_beyond_the_draft_length_follow_the_one_before_them():
    tracker = fed([0.6] * 7, 2, steps=500)
    found = tracker.alphas()
    assert found[1] == pytest.approx(0.6, abs=0.08)
    assert found[2:] == pytest.approx([found[1]] * 5)


def test_a_position_that_is_no_longer_drafted_returns_to_the_one_before_it():
    tracker, rng = fed([0.95, 0.95, 0.2], 3, steps=300), random.Random(1)
    assert tracker.alphas()[2] < 0.35
    for _ in range(600):
        tracker.observe(2, accept_lens([0.95, 0.95], 2, 8, rng))
    assert tracker.alphas()[2] > 0.8


@pytest.mark.parametrize(("before", "after"), [(0.95, 0.6), (0.6, 0.95)])
def test_a_change_is_followed(before, after):
    tracker, rng = fed([before] * 4, 4, steps=500), random.Random(1)
    for _ in range(300):
        tracker.observe(4, accept_lens([after] * 4, 4, 8, rng))
    assert tracker.alphas()[0] == pytest.approx(after, abs=0.08)


def test_a_weight_update_makes_the_next_steps_count():
    patient, updated = fed([0.9] * 3, 3, steps=500), fed([0.9] * 3, 3, steps=500)
    updated.weights_changed()
    for tracker in (patient, updated):
        for _ in range(10):
            tracker.observe(3, [1] * 8)
    assert updated.alphas()[0] < 0.5 < patient.alphas()[0]


def test_without_drafts_the_estimate_returns_to_the_prior():
    tracker = fed([0.2] * 3, 3, steps=300)
    assert tracker.alphas()[0] < 0.3
    tracker.idle(rows=8, steps=20_000)
    assert tracker.alphas()[0] == pytest.approx(PRIOR_ALPHA, abs=0.01)


def test_a_harder_request_is_told_from_an_easier_one():
    tracker, rng = AcceptanceTracker(5), random.Random(3)
    for _ in range(200):
        easy, hard = accept_lens([0.98] * 5, 5, 1, rng), accept_lens([0.7] * 5, 5, 1, rng)
        tracker.observe(5, easy + hard, ["easy", "hard"])
    assert tracker.theta("easy") < 0.4 < 1.2 < tracker.theta("hard")
    assert tracker.theta("never seen") == 1.0
    alone = {name: tracker.tokens(5, 1, [name])[5] for name in ("easy", "hard")}
    assert alone["easy"] > alone["hard"] + 1
    assert tracker.tokens(5, 2, ["easy", "hard"])[5] == pytest.approx(sum(alone.values()))


def test_requests_that_left_are_forgotten():
    tracker = AcceptanceTracker(3)
    for step in range(1000):
        tracker.observe(3, [2, 3], [f"{step}a", f"{step}b"])
    assert len(tracker._requests) == 2


def test_large_batches_use_the_average():
    tracker = AcceptanceTracker(3)
    names = list(range(TRACKED_ROWS + 1))
    tracker.observe(3, [1] * len(names), names)
    assert tracker.theta(0) == 1.0
    assert tracker.tokens(3, 40) == pytest.approx([40 * count for count in tracker.tokens(3, 1)])


@pytest.mark.parametrize("lens", [[0], [5], [2, -1]])
def test_counts_that_cannot_be_are_ignored_and_counted(lens):
    tracker = AcceptanceTracker(3)
    before = tracker.alphas()
    tracker.observe(3, lens)
    assert tracker.alphas() == before and tracker.ignored == 1 and tracker.drafted_at == [0, 0, 0]


@given(st.lists(st.tuples(st.integers(1, 7), st.lists(st.integers(1, 8), max_size=20)), max_size=30))
def test_estimates_stay_probabilities_and_tokens_grow_with_the_draft_length(steps):
    tracker = AcceptanceTracker(7)
    for gamma, lens in steps:
        tracker.observe(gamma, [min(count, gamma + 1) for count in lens])
    assert all(0.0 < alpha < 1.0 for alpha in tracker.alphas())
    tokens = tracker.tokens(7, 3)
    assert tokens[0] == 3 and all(low < high for low, high in pairwise(tokens))
    hoped = tracker.hoped(7, 2.0)
    assert all(hope * 3 >= count and math.isfinite(hope) for hope, count in zip(hoped, tokens))
