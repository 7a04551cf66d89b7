"""Closed loop: whatever came before, the policy finds back to the best draft length, both ways, in bounded time and
memory."""

from __future__ import annotations

from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st
from support.pretended_engine import GAMMA_MAX, Engine, regret
from support.properties import examples

from sglang_er.policy import TRACKED_ROWS, GoodputPolicy

# Steps until plain decode has forgotten enough of what it cannot see: evidence of costs fades in 3,200 plain steps,
# that of acceptance in 4,800 request-steps.
SOON = 3000
# Stretches of a rollout: batch, steps, acceptance, draft pass of a plain step, pace.
PASTS = st.lists(
    st.tuples(
        st.sampled_from([1, 3, 8, 16, 64]),
        st.integers(20, 500),
        st.floats(0.02, 0.99),
        st.floats(0.05, 1.5),
        st.sampled_from([0.5, 1.0, 2.0]),
    ),
    max_size=4,
)


def lived(past: list[tuple[int, int, float, float, float]], **options: object) -> Engine:
    engine = Engine(GoodputPolicy(GAMMA_MAX), **options)  # type: ignore[arg-type]
    for rows, steps, engine.alpha, engine.draft, engine.pace in past:
        engine.run(rows, steps)
    return engine


def plain_share(chosen: Counter[int]) -> float:
    return chosen[0] / sum(chosen.values())


def assert_on(engine: Engine, rows: int) -> None:
    chosen = engine.run(rows, 200)
    assert plain_share(chosen) < 0.1
    assert regret(engine, chosen, rows) < 0.1


@examples(5, shrink=False)
@given(PASTS, st.sampled_from([4, 8, 16]), st.booleans(), st.integers(0, 2))
# A draft pass that was as dear as a plain step, on a slower machine: was never tried again.
@example([(1, 20, 0.5, 1.0, 2.0)], 4, False, 0)
# Plain steps that were remembered from a slower machine: a useless draft seemed to save time for ever.
@example(
    [(3, 443, 0.99, 0.63, 1.0), (3, 431, 0.94, 0.21, 2.0), (8, 443, 0.6, 0.6, 1.0), (64, 29, 0.14, 0.4, 2.0)],
    16,
    False,
    0,
)
# A kink in the costs at 32 rows, between two draft lengths that are measured all the time, was never tried.
@example(
    [
        (16, 328, 0.1531764387916503, 1.05, 1.0),
        (16, 126, 0.0770745017320061, 0.9653766433107078, 1.0),
        (8, 71, 0.8251464205328947, 1.4628058805582578, 2.0),
        (16, 119, 0.95, 0.05, 0.5),
    ],
    16,
    False,
    2,
)
def test_whatever_came_before_speculation_is_on_where_it_pays_and_off_where_it_loses(past, rows, named, late):
    """No lock-out."""
    engine = lived(past, named=named, late=late)
    engine.alpha, engine.draft, engine.pace = 0.95, 0.15, 1.0
    engine.run(rows, SOON)
    assert_on(engine, rows)
    # And off again, sooner, because losses are seen in every step.
    engine.alpha, engine.draft = 0.1, 0.8
    engine.run(rows, 200)
    assert plain_share(engine.run(rows, 600)) > 0.9
    engine.seconds, engine.tokens = 0.0, 0
    engine.run(rows, 600)
    assert engine.seconds < 1.03 * engine.tokens / rows * engine.cost(rows, 0)
    # And on again.
    engine.alpha, engine.draft = 0.95, 0.15
    engine.run(rows, SOON)
    assert_on(engine, rows)


@examples(7, shrink=False)
@given(
    st.sampled_from([2, 8, 24]),
    st.floats(0.6, 0.97),
    st.floats(0.1, 0.5),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_drifted_costs_are_followed(rows, alpha, draft, dearer, pace):
    """The draft pass, the whole machine, or both."""
    engine = Engine(GoodputPolicy(GAMMA_MAX), alpha=alpha, draft=draft)
    engine.run(rows, 400)
    engine.draft, engine.pace = draft * dearer, pace
    engine.run(rows, SOON)
    assert regret(engine, engine.run(rows, 200), rows) < 0.04


@examples(8, shrink=False)
@given(st.floats(0.1, 0.98), st.floats(0.1, 0.98), st.sampled_from([2, 8, 24]), st.floats(0.1, 0.5))
def test_drifted_acceptance_is_followed(before, after, rows, draft):
    engine = Engine(GoodputPolicy(GAMMA_MAX), alpha=before, draft=draft)
    engine.run(rows, 3000 // rows)
    engine.alpha = after
    engine.run(rows, 12_000 // rows)
    assert regret(engine, engine.run(rows, 200), rows) < 0.04


@examples(25, shrink=False)
@given(
    st.floats(0.6, 0.98),
    st.floats(0.1, 0.6),
    st.booleans(),
    st.integers(0, 2),
    st.lists(st.sampled_from([(64, 2), (2, 64), (64, 16), (1, 48), (32, 4)]), min_size=1, max_size=4),
)
def test_under_refill_the_draft_length_follows_the_batch_within_two_steps(alpha, draft, named, late, swings):
    """64 requests shrink to 2 and are refilled: what is known of one size is used at once when it comes back."""
    engine = Engine(GoodputPolicy(GAMMA_MAX), alpha=alpha, draft=draft, named=named, late=late)
    for rows in (64, 48, 32, 16, 8, 4, 2, 1):
        engine.run(rows, 60)
    for rows in (64, 2, 64, *(size for swing in swings for size in swing)):
        best = engine.rate(rows, engine.best(rows))
        followed = [engine.rate(rows, engine.step(rows)) > 0.93 * best for _ in range(2)]
        assert any(followed), rows
        # Where it has arrived it stays, probes apart.
        chosen = engine.run(rows, 20)
        assert sum(count for gamma, count in chosen.items() if engine.rate(rows, gamma) > 0.93 * best) >= 15


def entries(value: object) -> int:
    """Of all containers that hang on this object."""
    if isinstance(value, dict):
        return len(value) + sum(entries(key) + entries(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return len(value) + sum(map(entries, value))
    if type(value).__module__.startswith("sglang_er"):
        return entries(vars(value)) if hasattr(value, "__dict__") else 0
    return 0


@examples(8, shrink=False)
@given(st.lists(st.sampled_from([1, 5, 16, 17, 64]), min_size=1, max_size=3), st.floats(0.3, 0.98))
def test_no_state_grows_with_steps_or_with_the_names_of_requests(sizes, alpha):
    """Beyond a fresh policy's there are the names and posteriors of one batch, a handful of entries each."""
    engine = Engine(GoodputPolicy(GAMMA_MAX), alpha=alpha, draft=0.2, named=True)
    engine.run(64, 2)
    held, described = entries(engine.policy), len(repr(engine.policy.describe()))
    for _ in range(8):
        for rows in sizes:
            engine.run(rows, 120)
        assert entries(engine.policy) <= held + 6 * TRACKED_ROWS
        assert len(repr(engine.policy.describe())) < described + 300
