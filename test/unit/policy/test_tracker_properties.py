"""What holds of the acceptance tracker for every history: its estimate, its memory, what moves it and which way."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.properties import examples

from sglang_er.policy.acceptance import (
    KEPT_EVIDENCE,
    MEMORY,
    PRIOR_ALPHA,
    PRIOR_WEIGHT,
    SHRINK,
    TRACKED_ROWS,
    AcceptanceTracker,
)

GAMMA_MAX = 5


class Seen(NamedTuple):
    """A step: its draft length (0: `lens` says only how many rows there were) and the tokens of each row."""

    gamma: int
    lens: list[int]


@st.composite
def histories(draw: st.DrawFn, least: int = 0) -> list[Seen]:
    steps = draw(
        st.lists(
            st.tuples(st.integers(0, GAMMA_MAX), st.lists(st.integers(1, GAMMA_MAX + 1), min_size=1, max_size=24)),
            min_size=least,
            max_size=25,
        )
    )
    return [Seen(gamma, [min(count, gamma + 1) for count in lens]) for gamma, lens in steps]


def feed(tracker: AcceptanceTracker, history: list[Seen]) -> AcceptanceTracker:
    for gamma, lens in history:
        if gamma:
            tracker.observe(gamma, lens)
        else:
            tracker.idle(len(lens))
    return tracker


def chains(alpha: float, gamma: int, rows: int, rng: random.Random) -> list[int]:
    """Committed tokens of `rows` requests of that acceptance."""
    return [1 + min(gamma, int(math.log(1.0 - rng.random()) / math.log(alpha))) for _ in range(rows)]


def expected_alphas(history: list[Seen], memory: float) -> list[float]:
    """The docstring's formula over the whole history at once: every count by the age that it has at the end."""
    ages, age = [], 0.0
    for gamma, lens in reversed(history):
        ages.append(age)
        age += len(lens) / (memory if gamma else 8 * memory)
    alpha, weight, found = PRIOR_ALPHA, PRIOR_WEIGHT, []
    for position in range(GAMMA_MAX):
        drafted = accepted = 0.0
        for (gamma, lens), age in zip(history, reversed(ages)):
            if gamma > position:
                reached = [count for count in lens if count > position]
                drafted += math.exp(-age) * len(reached)
                accepted += math.exp(-age) * sum(count > position + 1 for count in reached)
        alpha = min(max((accepted + weight * alpha) / (drafted + weight), 0.01), 0.9995)
        weight = SHRINK
        found.append(alpha)
    return found


@examples(150)
@given(histories(), st.sampled_from([20.0, MEMORY]))
def test_the_estimate_is_the_quotient_of_faded_counts_of_the_positions_that_were_reached(history, memory):
    tracker = feed(AcceptanceTracker(GAMMA_MAX, memory), history)
    assert tracker.alphas() == pytest.approx(expected_alphas(history, memory), abs=1e-9)


@examples(60)
@given(histories())
def test_expected_tokens_are_the_sums_of_the_chains_survival(history):
    tracker = feed(AcceptanceTracker(GAMMA_MAX), history)
    alphas = tracker.alphas()
    tokens = [1.0 + sum(math.prod(alphas[:i]) for i in range(1, gamma + 1)) for gamma in range(GAMMA_MAX + 1)]
    assert tracker.tokens(GAMMA_MAX, 1) == pytest.approx(tokens)
    # Requests that nobody has seen are average ones, and who comes first does not matter.
    assert tracker.tokens(GAMMA_MAX, 3, ["a", "b", "c"]) == pytest.approx([3 * count for count in tokens])


@examples(25)
@given(st.floats(0.2, 0.97), st.lists(st.integers(1, GAMMA_MAX), min_size=1, max_size=6), st.integers(1, 24))
def test_the_estimate_does_not_depend_on_which_draft_lengths_were_tried(alpha, gammas, rows):
    """Chains that ended earlier are censored, not counted as failures of the positions behind their end."""
    tracker, rng = AcceptanceTracker(GAMMA_MAX), random.Random(7)
    for index in range(3000 // rows):
        gamma = gammas[index % len(gammas)]
        tracker.observe(gamma, chains(alpha, gamma, rows, rng))
    # Four standard deviations of a quotient over what is left of the counts; the prior, or the position before, weighs
    # as much as PRIOR_WEIGHT of them.
    spread = PRIOR_WEIGHT / MEMORY
    for found, evidence in zip(tracker.alphas()[: max(gammas)], tracker.describe()["evidence"]):
        if evidence > 40:
            spread += 4 * math.sqrt(alpha * (1 - alpha) / evidence)
            assert found == pytest.approx(alpha, abs=spread)


@examples(100)
@given(histories(least=1), st.data())
def test_a_chain_that_is_accepted_to_its_end_lowers_no_estimate(history, data):
    place = data.draw(st.integers(0, len(history) - 1))
    gamma, lens = history[place]
    assume(gamma)
    better = list(history)
    better[place] = Seen(gamma, [gamma + 1, *lens[1:]])
    before = feed(AcceptanceTracker(GAMMA_MAX), history)
    after = feed(AcceptanceTracker(GAMMA_MAX), better)
    assert all(new >= old - 1e-12 for new, old in zip(after.alphas(), before.alphas()))
    assert all(new >= old - 1e-9 for new, old in zip(after.tokens(GAMMA_MAX, 4), before.tokens(GAMMA_MAX, 4)))


@examples(25)
@given(
    st.floats(0.05, 0.99),
    st.floats(0.05, 0.99),
    st.integers(1, GAMMA_MAX),
    st.integers(1, GAMMA_MAX),
    st.sampled_from([1, 8, 24]),
)
def test_a_change_of_acceptance_is_found_within_three_memories(before, after, gamma_before, gamma_after, rows):
    tracker, rng = AcceptanceTracker(GAMMA_MAX), random.Random(3)
    for alpha, gamma, observed in ((before, gamma_before, 4000), (after, gamma_after, 3 * MEMORY)):
        for _ in range(int(observed / rows)):
            tracker.observe(gamma, chains(alpha, gamma, rows, rng))
    # e**-3 of the difference is left, beside chance.
    spread = abs(before - after) * math.exp(-3) + 4 * math.sqrt(after * (1 - after) / MEMORY) + 0.02
    assert tracker.alphas()[0] == pytest.approx(after, abs=spread)


@examples(60)
@given(histories(least=1), st.integers(1, 64), st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_without_drafts_every_estimate_goes_towards_the_prior_and_not_past_it(history, rows, pauses):
    tracker = feed(AcceptanceTracker(GAMMA_MAX), history)
    distance = tracker.alphas()[0] - PRIOR_ALPHA
    for steps in pauses:
        tracker.idle(rows, steps)
        left = tracker.alphas()[0] - PRIOR_ALPHA
        assert left * distance >= 0.0 and abs(left) <= abs(distance) + 1e-12
        distance = left
    tracker.idle(1, 8 * MEMORY * 12)
    assert tracker.alphas() == pytest.approx([PRIOR_ALPHA] * GAMMA_MAX, abs=1e-3)


@examples(60)
@given(histories(), histories())
def test_a_weight_update_keeps_the_idea_and_no_more_than_some_evidence(before, after):
    tracker = feed(AcceptanceTracker(GAMMA_MAX), before)
    old, evidence = tracker.alphas(), tracker.describe()["evidence"]
    tracker.weights_changed()
    kept = tracker.describe()["evidence"]
    assert max(kept) <= KEPT_EVIDENCE + 0.1 and all(new <= was for new, was in zip(kept, evidence))
    # Less evidence, more of the prior: between the two at the first position.
    assert min(old[0], PRIOR_ALPHA) - 1e-9 <= tracker.alphas()[0] <= max(old[0], PRIOR_ALPHA) + 1e-9
    once = tracker.alphas()
    tracker.weights_changed()
    assert tracker.alphas() == pytest.approx(once)
    assert all(0 < alpha < 1 for alpha in feed(tracker, after).alphas())


@examples(40)
@given(st.lists(st.tuples(st.integers(1, GAMMA_MAX), st.integers(1, GAMMA_MAX + 1)), min_size=1, max_size=40))
def test_of_two_requests_the_one_that_is_accepted_further_is_the_easier_one(steps):
    tracker = AcceptanceTracker(GAMMA_MAX)
    for gamma, count in steps:
        tracker.observe(gamma, [gamma + 1, min(count, gamma + 1)], ["easy", "other"])
    assert tracker.theta("easy") <= tracker.theta("other") + 1e-12
    assert tracker.theta("easy") < 1.0
    easy, other = (tracker.tokens(GAMMA_MAX, 1, [name]) for name in ("easy", "other"))
    assert all(more >= less - 1e-12 for more, less in zip(easy, other))
    both = tracker.tokens(GAMMA_MAX, 2, ["easy", "other"])
    assert both == pytest.approx(tracker.tokens(GAMMA_MAX, 2, ["other", "easy"]))


@examples(20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, GAMMA_MAX))
def test_no_more_requests_are_remembered_than_the_last_batch_had(sizes, gamma):
    tracker, name = AcceptanceTracker(GAMMA_MAX), 0
    for size in sizes * 20:
        names = list(range(name, name + size))
        name += size // 2 + 1
        tracker.observe(gamma, [1 + row % (gamma + 1) for row in range(size)], names)
        assert len(tracker._requests) <= TRACKED_ROWS
        if size <= TRACKED_ROWS:
            assert set(tracker._requests) == set(names)


@examples(60)
@given(histories(), st.integers(-2, GAMMA_MAX + 3), st.lists(st.integers(-3, GAMMA_MAX + 4), max_size=6))
def test_outcomes_that_cannot_be_change_nothing_but_their_count(history, gamma, lens):
    assume(not lens or not 0 < gamma <= GAMMA_MAX or min(lens) < 1 or max(lens) > gamma + 1)
    tracker = feed(AcceptanceTracker(GAMMA_MAX), history)
    before, ignored = tracker.describe(), tracker.ignored
    tracker.observe(gamma, lens, list(range(len(lens))))
    counted = bool(lens) and 0 < gamma <= GAMMA_MAX
    assert tracker.describe() == {**before, "ignored": ignored + counted}
    assert not tracker._requests
