"""What holds of policy goodput's choice for every state of its knowledge, and of what it says about itself."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Hashable

from hypothesis import assume, given
from hypothesis import strategies as st
from support.pretended_engine import GAMMA_MAX, Engine
from support.properties import examples

from sglang_er.policy import GoodputPolicy, StepOutcome, StepState
from sglang_er.policy.cost_features import Step
from sglang_er.policy.probes import ProbeBudget

ROWS = st.sampled_from([1, 2, 5, 12, 24, 64])
KNOWLEDGE = st.tuples(
    st.floats(0.05, 0.99),  # acceptance
    st.floats(0.05, 0.9),  # draft pass, of a plain step
    st.lists(st.tuples(ROWS, st.integers(1, 25)), min_size=1, max_size=4),  # batches, steps
    st.booleans(),  # requests are named
)


def informed(knowledge: tuple[float, float, list[tuple[int, int]], bool], **options: object) -> GoodputPolicy:
    """A policy that went through that rollout; then it probes no more."""
    alpha, draft, batches, named = knowledge
    policy = GoodputPolicy(GAMMA_MAX, **options)  # type: ignore[arg-type]
    engine = Engine(policy, alpha=alpha, draft=draft, named=named)
    for rows, steps in batches:
        engine.run(rows, steps)
    policy.budget = ProbeBudget(0.0)
    policy.checks.due = lambda *_: False  # type: ignore[method-assign]
    return policy


def rates(policy: GoodputPolicy, state: StepState, alphas: list[float]) -> list[float]:
    """Expected tokens per second by draft length, from costs one by one; requests are average ones."""
    step, others = Step(state.batch_size, state.context_tokens), state.batch_size - state.speculative_rows
    found = []
    for gamma in range(min(state.gamma_limit, GAMMA_MAX) + 1):
        each = 1.0 + sum(math.prod(alphas[:i]) for i in range(1, gamma + 1))
        seconds = policy.cost.step(step, gamma, state.speculative_rows)
        found.append((state.speculative_rows * each + others) / seconds)
    return found


@examples(60)
@given(KNOWLEDGE, ROWS, st.integers(0, 60), st.integers(1, GAMMA_MAX + 2), st.sampled_from([0.0, 0.05, 0.5]))
def test_the_choice_has_the_best_rate_but_for_the_hysteresis(knowledge, rows, standing_by, limit, hysteresis):
    """`standing_by`: requests that may not draft and take one token whatever is chosen."""
    policy = informed(knowledge, hysteresis=hysteresis)
    assume(policy.guard.allows())
    state = StepState(rows + standing_by, (rows + standing_by) * 500, limit, rows)
    last = policy.describe()["gamma"]
    expected = rates(policy, state, policy.tracker.alphas())
    chosen = policy.choose(state)
    assert expected[chosen] * (1.0 + hysteresis) >= max(expected) * (1 - 1e-9)
    if last < len(expected) and expected[last] * (1.0 + hysteresis) >= max(expected):
        assert chosen == last
    elif hysteresis == 0.0:
        assert expected[chosen] >= max(expected) * (1 - 1e-9)


@examples(60)
@given(KNOWLEDGE, ROWS, st.lists(st.tuples(st.integers(1, GAMMA_MAX), st.integers(1, 40)), min_size=1, max_size=6))
def test_higher_acceptance_never_shortens_the_draft_length(knowledge, rows, accepted):
    """The same costs; the better history has more chains that were accepted to their end, which lowers no alpha_i."""
    policy = informed(knowledge)
    assume(policy.guard.allows())
    better = copy.deepcopy(policy)
    for gamma, count in accepted:
        policy.tracker.observe(gamma, [1] * count)
        better.tracker.observe(gamma, [gamma + 1] * count)
    pairs = list(zip(better.tracker.alphas(), policy.tracker.alphas()))
    assume(all(high >= low for high, low in pairs))
    state = StepState(rows, rows * 500, GAMMA_MAX, rows)
    assert better.choose(state) >= policy.choose(state)


@examples(60)
@given(KNOWLEDGE, ROWS, st.floats(0.2, 1.0))
def test_a_draft_pass_that_is_cheaper_in_the_model_never_shortens_the_draft_length(knowledge, rows, share):
    """The same knowledge but for the draft's costs. A verify pass that grows faster than its drafts could shorten a
    chain that got cheaper; roofs do not do that, noise may."""
    policy = informed(knowledge)
    assume(policy.guard.allows() and policy.cost.observed["draft"])
    state, step = StepState(rows, rows * 500, GAMMA_MAX, rows), Step(rows, rows * 500)
    verify = [policy.cost.verify(step, gamma) / gamma for gamma in range(1, GAMMA_MAX + 1)]
    assume(verify == sorted(verify, reverse=True))
    cheaper = copy.deepcopy(policy)
    cheaper.cost._draft.mean = [share * weight for weight in policy.cost._draft.mean]
    assert cheaper.choose(state) >= policy.choose(state)


@examples(40)
@given(KNOWLEDGE, ROWS, st.integers(0, 12))
def test_a_lower_limit_is_a_choice_among_fewer(knowledge, rows, limit):
    policy = informed(knowledge)
    assume(policy.guard.allows())
    free, bound = copy.deepcopy(policy), copy.deepcopy(policy)
    state = StepState(rows, rows * 500, GAMMA_MAX, rows)
    chosen = free.choose(state)
    if chosen <= limit:
        assert bound.choose(state._replace(gamma_limit=limit)) == chosen
    else:
        assert bound.choose(state._replace(gamma_limit=limit)) <= limit


@examples(30)
@given(st.floats(0.05, 0.99), st.floats(0.05, 0.9), st.integers(1, 10), st.integers(1, 60))
def test_where_all_requests_are_alike_both_objectives_choose_the_same(alpha, draft, rows, steps):
    chosen = []
    for objective in ("tokens", "makespan"):
        policy = informed((alpha, draft, [(rows, steps)], False), objective=objective)
        chosen.append(policy.choose(StepState(rows, rows * 500, GAMMA_MAX, rows, tuple(range(rows)))))
    assert chosen[0] == chosen[1]


@examples(20)
@given(KNOWLEDGE, st.sampled_from([2.0**-10, 2.0**7]))
def test_a_machine_of_another_pace_is_decided_for_alike(knowledge, pace):
    """No constant of the policy is a number of seconds."""
    alpha, draft, batches, named = knowledge
    chosen = []
    for factor in (1.0, pace):
        engine = Engine(GoodputPolicy(GAMMA_MAX), alpha=alpha, draft=draft, named=named, pace=factor)
        chosen.append([engine.step(rows) for rows, steps in batches for _ in range(steps)])
    assert chosen[0] == chosen[1]


SECONDS = st.one_of(
    st.floats(1e-4, 0.1),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-320, 1e300]),
)
OUTCOMES = st.lists(
    st.tuples(ROWS, st.integers(0, GAMMA_MAX), SECONDS, SECONDS, st.booleans(), st.integers(0, 2**16)), max_size=30
)


def finite_and_plain(value: object) -> bool:
    """JSON that any reader takes: no nan, no infinity, no tuples, keys are strings."""
    return json.loads(json.dumps(value, allow_nan=False)) == value


@examples(150)
@given(OUTCOMES)
def test_whatever_happened_it_describes_itself_in_finite_plain_json(outcomes):
    policy = GoodputPolicy(GAMMA_MAX)
    assert finite_and_plain(policy.describe())
    for rows, gamma, seconds, draft_seconds, named, seed in outcomes:
        rng = random.Random(seed)
        names: tuple[Hashable, ...] = tuple((seed, row) for row in range(rows)) if named else ()
        state = StepState(rows, rows * 300, GAMMA_MAX, rows, names)
        assert 0 <= policy.choose(state) <= GAMMA_MAX
        policy.observe(StepOutcome(state, gamma, rng.choices(range(1, gamma + 2), k=rows), seconds, draft_seconds))
        assert finite_and_plain(policy.describe())


@examples(60)
@given(
    KNOWLEDGE,
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0]),
    st.integers(0, GAMMA_MAX),
    st.integers(1, 12),
)
def test_a_time_that_is_none_moves_no_money(knowledge, bad, gamma, rows):
    """Costs, guard's sums and budget stay; acceptance, which was counted and not timed, is learnt."""
    policy = informed(knowledge)
    policy.budget = ProbeBudget(0.004)
    policy.budget.begin(1e-3)
    before, ignored = copy.deepcopy(policy), policy.cost.ignored
    policy.observe(StepOutcome(StepState(rows, rows * 300, GAMMA_MAX, rows), gamma, [1] * rows, bad, bad))
    assert policy.cost.ignored == ignored + 1
    step = Step(rows, rows * 300)
    if policy.cost.ready:
        assert policy.cost.curve(step, GAMMA_MAX, rows) == before.cost.curve(step, GAMMA_MAX, rows)
    assert policy.budget.seconds == before.budget.seconds
    for name in ("predicted_seconds", "measured_seconds"):
        assert policy.describe()[name] == before.describe()[name]
    assert policy.guard.seconds_saved == before.guard.seconds_saved
    assert policy.guard.seconds_drafting == before.guard.seconds_drafting
    if gamma:
        assert policy.tracker.drafted_at[0] == before.tracker.drafted_at[0] + rows
