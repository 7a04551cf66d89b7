"""The chosen draft length is the best one, follows what changes, and no state locks it in."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pretended_engine import Engine, regret

from sglang_er.policy import StepOutcome, StepState
from sglang_er.policy.cost_features import Step
from sglang_er.policy.cost_model import CostModel
from sglang_er.policy.goodput import GoodputPolicy
from sglang_er.policy.guard import FIRST_PAUSE, WINDOW, Guard


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("alpha", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("draft", [0.15, 0.3, 0.6])
def test_it_finds_the_best_draft_length(rows, alpha, draft):
    engine = Engine(GoodputPolicy(7), alpha=alpha, draft=draft)
    engine.run(rows, 150)
    assert regret(engine, engine.run(rows, 200), rows) < 0.02


def test_nothing_is_drafted_before_a_plain_step_was_timed():
    policy = GoodputPolicy(7)
    state = StepState(1, 100, 7, 1)
    assert policy.choose(state) == 0
    policy.observe(StepOutcome(state, 0, [1], math.nan))
    assert policy.choose(state) == 0
    policy.observe(StepOutcome(state, 0, [1], 0.01))
    assert policy.choose(state) > 0


@given(st.integers(1, 64), st.integers(-1, 9), st.integers(0, 64))
def test_it_stays_within_what_the_step_can_hold(rows, limit, speculating):
    engine = Engine(GoodputPolicy(7))
    engine.run(8, 5)
    gamma = engine.policy.choose(StepState(rows, rows * 10, limit, min(speculating, rows)))
    assert 0 <= gamma <= max(0, min(limit, 7))
    if speculating == 0:
        assert gamma == 0


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 0.8), st.floats(0.3, 0.95), st.sampled_from([1, 2, 8, 24]), st.floats(0.5, 0.98))
def test_a_cheaper_draft_never_shortens_the_draft_length(dear, share, rows, alpha):
    """Known costs, no probes: only the choice itself."""
    chosen = []
    for draft in (dear, dear * share):
        engine = Engine(GoodputPolicy(7, probe_share=0.0), draft=draft)
        cost = engine.policy.cost
        step = Step(rows, rows * 500)
        for _ in range(3):
            for gamma in range(8):
                for _ in range(20):
                    if gamma:
                        cost.observe_speculative(
                            step, step, gamma, engine.cost(rows, gamma), gamma * draft * engine.target(rows)
                        )
                    else:
                        cost.observe_plain(step, engine.cost(rows, 0))
        for _ in range(50):
            engine.policy.tracker.observe(7, [1 + min(7, math.floor(math.log(engine.rng.random(), alpha)))])
        engine.rng.seed(0)
        chosen.append(engine.policy)
    tracker = chosen[0].tracker
    chosen[1].tracker = tracker
    state = StepState(rows, rows * 500, 7, rows)
    longer, shorter = chosen[1].choose(state), chosen[0].choose(state)
    assert longer >= shorter


@pytest.mark.parametrize(("before", "after"), [(0.4, 0.97), (0.97, 0.4)])
def test_a_change_of_acceptance_is_followed(before, after):
    engine = Engine(GoodputPolicy(7), alpha=before, draft=0.4)
    engine.run(4, 400)
    engine.alpha = after
    engine.run(4, 600)
    assert regret(engine, engine.run(4, 300), 4) < 0.03


def test_speculation_that_was_off_comes_back():
    """No lock-out: a useless draft becomes a good one while nothing is drafted."""
    engine = Engine(GoodputPolicy(7), alpha=0.1, draft=0.6)
    assert engine.run(2, 600)[0] > 500
    engine.alpha, engine.draft = 0.95, 0.2
    engine.run(2, 6000)
    assert regret(engine, engine.run(2, 300), 2) < 0.05


def test_useless_speculation_costs_next_to_nothing():
    engine = Engine(GoodputPolicy(7), alpha=0.2, draft=0.7)
    engine.run(4, 4000)
    plain = engine.tokens / 4 * engine.cost(4, 0)
    assert engine.seconds < 1.01 * plain


def test_the_draft_length_follows_the_batch_within_two_steps():
    engine = Engine(GoodputPolicy(7, probe_share=0.0), alpha=0.9, draft=0.25)
    for rows in (64, 32, 16, 8, 4, 2, 1):
        engine.run(rows, 100)
    for rows in (1, 64, 1, 32, 2, 64):
        chosen = engine.run(rows, 3)
        best = engine.rate(rows, engine.best(rows))
        assert any(engine.rate(rows, gamma) > 0.95 * best for gamma in chosen), (rows, chosen)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_seed_is_corrected(factor):
    policy = GoodputPolicy(7)
    engine = Engine(policy, alpha=0.9, draft=0.3)
    step = Step(4, 2000)
    for _ in range(5):
        policy.cost.observe_plain(step, engine.cost(4, 0))
        for gamma in (3, 7):
            draft = gamma * 0.3 * factor * engine.target(4)
            policy.cost.observe_speculative(step, step, gamma, draft + engine.target(4 * (gamma + 1)), draft)
    engine.run(4, 100)
    assert regret(engine, engine.run(4, 200), 4) < 0.02


def test_hysteresis_keeps_the_draft_length_for_a_small_gain():
    engine = Engine(GoodputPolicy(7, hysteresis=10.0, probe_share=0.0))
    engine.run(1, 1)
    first = engine.run(1, 1).most_common(1)[0][0]
    assert set(engine.run(8, 50)) <= {first, 0}


def test_stragglers_decide_under_objective_makespan():
    policies = {name: GoodputPolicy(7, objective=name, probe_share=0.0) for name in ("tokens", "makespan")}
    gammas = {}
    for name, policy in policies.items():
        rng, state = random.Random(0), StepState(4, 2000, 7, 4, ("a", "b", "c", "slow"))
        policy.observe(StepOutcome(state._replace(requests=()), 0, [1] * 4, 0.01))
        for _ in range(300):
            lens = []
            for alpha in (0.99, 0.99, 0.99, 0.4):
                count = 1
                while count <= 5 and rng.random() < alpha:
                    count += 1
                lens.append(count)
            policy.observe(StepOutcome(state, 5, lens, 0.03, 0.015))
        assert policy.choose(state) == 0  # a plain step is due: there was but one
        gammas[name] = policy.choose(state)
    assert gammas["makespan"] < gammas["tokens"]


def test_savings_are_accounted_for():
    engine = Engine(GoodputPolicy(7), alpha=0.95, draft=0.2)
    engine.run(1, 500)
    plain = engine.tokens * engine.cost(1, 0)
    saved = engine.policy.describe()["guard"]["seconds_saved"]
    assert saved == pytest.approx(plain - engine.seconds, rel=0.05)


def test_the_guard_switches_off_what_loses_and_tries_again():
    guard = Guard()
    for _ in range(WINDOW):
        assert guard.allows()
        guard.drafted(seconds=0.02, plain_seconds=0.015)
    assert not guard.allows() and guard.switched_off == 1
    for _ in range(FIRST_PAUSE):
        guard.passed()
    assert guard.allows()
    for _ in range(WINDOW):
        guard.drafted(0.02, 0.015)
    for _ in range(FIRST_PAUSE):
        guard.passed()
    assert not guard.allows()  # the second pause is longer


def test_the_guard_does_not_mind_an_interruption():
    guard = Guard()
    for index in range(4 * WINDOW):
        guard.drafted(5.0 if index == 60 else 0.01, 0.015)
    assert guard.allows() and guard.switched_off == 0


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf])
def test_the_guard_ignores_times_that_are_no_times(bad):
    guard = Guard()
    guard.drafted(bad, 0.01)
    assert guard.seconds_saved == 0.0


def test_memory_does_not_grow_with_steps_or_requests():
    policy = GoodputPolicy(7)
    for index in range(3000):
        state = StepState(2, 1000, 7, 2, (f"{index}a", f"{index}b"))
        gamma = policy.choose(state)
        policy.observe(StepOutcome(state, gamma, [1, 1], 0.02, 0.005 if gamma else math.nan))
    assert len(policy.tracker._requests) <= 2
    assert len(str(policy.describe())) < 2000


def test_a_known_cost_model_can_be_handed_over():
    cost = CostModel()
    cost.observe_plain(Step(1, 100), 0.01)
    assert GoodputPolicy(7, cost=cost).choose(StepState(1, 100, 7, 1)) > 0
