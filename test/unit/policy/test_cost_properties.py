"""What holds of the cost model for every history: what it ignores, what it follows, and the linear algebra below it."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.properties import examples

from sglang_er.policy import seeding
from sglang_er.policy.cost_features import Step
from sglang_er.policy.cost_model import CostModel
from sglang_er.policy.linear_model import LinearModel

NO_TIMES = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, -1e-300])


class Machine:
    """True costs: flat until `knee` rows, then rising. `draft`: of a plain step."""

    def __init__(self, knee: float = 48.0, draft: float = 0.4, pace: float = 1.0, noise: float = 0.02) -> None:
        self.knee, self.share, self.pace, self.noise = knee, draft, pace, noise

    def plain(self, step: Step) -> float:
        return self.pace * (0.010 * max(1.0, step.rows / self.knee) + 2e-8 * step.context)

    def draft(self, step: Step) -> float:
        return self.share * self.pace * (0.010 * max(1.0, 2 * step.rows / self.knee) + 2e-8 * step.context)

    def verify(self, step: Step, gamma: int) -> float:
        return self.plain(step._replace(rows=step.rows * (gamma + 1)))

    def tell(self, model: CostModel, step: Step, gamma: int, rng: random.Random, split: bool = True) -> None:
        if gamma == 0:
            model.observe_plain(step, self.plain(step) * rng.gauss(1, self.noise))
            return
        draft = gamma * self.draft(step) * rng.gauss(1, self.noise)
        verify = self.verify(step, gamma) * rng.gauss(1, self.noise)
        model.observe_speculative(step, step, gamma, draft + verify, draft if split else math.nan)


def taught(machine: Machine, sizes: list[int], steps: int, seed: int = 0, split: bool = True) -> CostModel:
    model, rng = CostModel(), random.Random(seed)
    for index in range(steps):
        rows = sizes[index % len(sizes)]
        machine.tell(model, Step(rows, rows * 700), rng.choice([0, 0, 1, 3, 5]) if index else 0, rng, split)
    return model


def state_of(model: CostModel) -> dict[str, object]:
    """Everything that the model holds but its count of ignored times."""
    held = copy.deepcopy(model.__dict__)
    for name in ("_target", "_draft"):
        held[name] = dict(held[name].__dict__)
    del held["_models"], held["ignored"]
    return held


SIZES = st.lists(st.sampled_from([1, 2, 5, 16, 40, 100]), min_size=1, max_size=4)


@examples(40)
@given(SIZES, st.integers(0, 60), NO_TIMES, NO_TIMES, st.integers(1, 7))
def test_times_that_are_no_times_change_nothing_but_their_count(sizes, steps, bad, worse, gamma):
    model, step = taught(Machine(), sizes, steps), Step(4, 2800)
    before, ignored = repr(state_of(model)), model.ignored  # repr: nan is not equal to itself
    model.observe_plain(step, bad)
    model.observe_draft(step, worse)
    model.observe_verify(step, gamma, bad)
    model.observe_speculative(step, step, gamma, worse, 0.01)
    assert model.ignored == ignored + 4
    if model.ready and not math.isnan(bad):
        model.observe_speculative(step, step, gamma, 0.01, bad)
        assert model.ignored == ignored + 5
    assert repr(state_of(model)) == before


@examples(40)
@given(SIZES, st.integers(1, 120), st.integers(1, 300), st.integers(0, 400_000), st.integers(0, 300), st.booleans())
def test_a_curve_says_what_every_step_of_it_says(sizes, steps, rows, context, drafting, split):
    model, step = taught(Machine(), sizes, steps, split=split), Step(rows, context)
    drafting = min(max(drafting, 1), rows)
    curve = model.curve(step, 7, drafting)
    assert curve == pytest.approx([model.step(step, gamma, drafting) for gamma in range(8)], rel=1e-9)
    if model.observed["verify"] and split:  # the parts are known
        draft = model.draft(step._replace(rows=drafting))
        parts = [gamma * draft + model.verify(step, gamma) for gamma in range(1, 8)]
        assert curve == pytest.approx([model.plain(step), *parts], rel=1e-9)
    assert all(seconds >= curve[0] / 1.05 * (1 - 1e-9) for seconds in curve)
    assert all(model.deviation(step, gamma, 0, drafting) > 0 for gamma in range(1, 8))
    for limit in (0, 1, 5):
        assert model.curve(step, limit, drafting) == pytest.approx(curve[: limit + 1], rel=1e-9)


@examples(25)
@given(SIZES, st.integers(1, 150), st.sampled_from([2.0**-12, 0.25, 8.0, 2.0**10]), st.booleans())
def test_the_unit_of_time_does_not_matter(sizes, steps, factor, split):
    """A power of two: then even rounding is the same."""
    model = taught(Machine(), sizes, steps, split=split)
    scaled = taught(Machine(pace=factor), sizes, steps, split=split)
    for step in (Step(1, 100), Step(7, 9000), Step(90, 200_000)):
        assert scaled.curve(step, 7, step.rows) == [factor * seconds for seconds in model.curve(step, 7, step.rows)]
        assert scaled.deviation(step, 3, 0, step.rows) == factor * model.deviation(step, 3, 0, step.rows)


@examples(40)
@given(
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.4, 1.0, 2.5]),
    st.sampled_from([1, 4, 30]),
    st.booleans(),
    st.integers(0, 99),
)
@example(2.0, 2.5, 1, False, 0)  # the surprise belongs to the draft pass, and only the sum is seen
def test_drifted_costs_are_found_again(target, draft, rows, split, seed):
    """Another pace of the whole machine, another share of the draft pass, or both, after a long quiet time."""
    model, rng = taught(Machine(), [rows], 300, seed, split), random.Random(seed + 1)
    machine, step = Machine(draft=0.4 * draft, pace=target), Step(rows, rows * 700)
    for _ in range(200):
        machine.tell(model, step, rng.choice([0, 1, 3, 5]), rng, split)
    for gamma in (0, 1, 3, 5):
        truth = machine.plain(step) if gamma == 0 else machine.verify(step, gamma) + gamma * machine.draft(step)
        assert model.step(step, gamma) == pytest.approx(truth, rel=0.1), gamma


@examples(25)
@given(st.floats(0.25, 4.0), SIZES, st.sampled_from([1, 3, 7]))
def test_a_wrong_seed_of_the_draft_pass_is_forgotten_within_thirty_steps(error, sizes, gamma):
    model, machine, rng = CostModel(), Machine(), random.Random(0)
    wrong = Machine(draft=0.4 * error)
    timings = []
    for rows in (1, 4, 16, 64):
        step = Step(rows, rows * 64)
        timings += [("plain", step, 0, wrong.plain(step)), ("draft", step, 0, wrong.draft(step))]
        timings += [("verify", step, 3, wrong.verify(step, 3))]
    seeding.seed(model, timings)
    for index in range(30):
        rows = sizes[index % len(sizes)]
        machine.tell(model, Step(rows, rows * 700), gamma, rng)
    step = Step(sizes[-1], sizes[-1] * 700)
    assert model.draft(step) == pytest.approx(machine.draft(step), rel=0.08)


@examples(20)
@given(SIZES, st.integers(1, 100), st.integers(1, 128))
def test_a_dearer_draft_pass_makes_every_draft_dearer_and_a_plain_step_not(sizes, steps, rows):
    """The two models are told the same but for the draft pass, which is timed by itself."""
    cheap, dear = (taught(Machine(draft=share), sizes, steps) for share in (0.2, 0.5))
    step = Step(rows, rows * 700)
    if not dear.observed["draft"]:
        return
    low, high = cheap.curve(step, 7, rows), dear.curve(step, 7, rows)
    assert low[0] == pytest.approx(high[0], rel=1e-9) and all(less < more for less, more in zip(low[1:], high[1:]))


@examples(40)
@given(SIZES, st.integers(1, 80), st.sampled_from([0.3, 1.0, 3.0]), st.sampled_from([1, 3, 7]), st.integers(1, 128))
def test_a_plain_step_is_never_believed_dearer_than_the_verify_passes_with_its_rows(sizes, steps, pace, gamma, rows):
    """Plain steps were seen at one pace of the machine, verify passes at another."""
    model, rng = taught(Machine(pace=3.0), sizes, steps), random.Random(1)
    for _ in range(60):
        Machine(pace=pace).tell(model, Step(rows, rows * 700), gamma, rng)
    step = Step(rows, rows * 700)
    assert model.plain(step) <= 1.05 * min(model.verify(step, drafts) for drafts in (1, 3, 7)) * (1 + 1e-9)
    assert model.curve(step, gamma, rows)[0] == model.plain(step) == model.step(step, 0)


def observations(size: int) -> st.SearchStrategy[list[tuple[list[tuple[int, float]], float, float]]]:
    """(sparse features, error of what is seen, noise)."""
    value = st.floats(-2.0, 2.0).map(lambda number: round(number, 3))
    features = st.dictionaries(st.integers(0, size - 1), value, min_size=1, max_size=size).map(
        lambda chosen: list(chosen.items())
    )
    return st.lists(st.tuples(features, st.floats(-3.0, 3.0), st.floats(0.01, 2.0)), min_size=1, max_size=12)


def linear(size: int, seed: int) -> tuple[LinearModel, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    mean, covariance = rng.normal(size=size), root @ root.T + 0.1 * np.eye(size)
    return LinearModel(mean.tolist(), covariance.tolist()), mean, covariance


def dense(features: list[tuple[int, float]], size: int) -> np.ndarray:
    vector = np.zeros(size)
    for index, value in features:
        vector[index] = value
    return vector


@examples(60)
@given(st.integers(0, 99), observations(6))
def test_recursive_regression_ends_where_all_observations_at_once_do(seed, seen):
    """The posterior of a linear model with a normal prior, in closed form (information form, dense, numpy)."""
    model, mean, covariance = linear(6, seed)
    information, pull = np.linalg.inv(covariance), np.linalg.solve(covariance, mean)
    for features, value, noise in seen:
        x = dense(features, 6)
        model.update(features, value - model.predict(features), noise)
        information = information + np.outer(x, x) / noise
        pull = pull + x * value / noise
    posterior = np.linalg.inv(information)
    assert model.mean == pytest.approx((posterior @ pull).tolist(), rel=1e-5, abs=1e-6)
    for features, _, _ in seen:
        x = dense(features, 6)
        assert model.variance(features) == pytest.approx(float(x @ posterior @ x), rel=1e-5, abs=1e-8)


@examples(60)
@given(st.integers(0, 99), observations(6), st.floats(0.0, 1.0))
def test_evidence_narrows_and_forgetting_widens_up_to_the_prior(seed, seen, share):
    model, _, covariance = linear(6, seed)
    for features, error, noise in seen:
        before = [model.variance(other) for other, _, _ in seen]
        model.update(features, error, noise)
        assert all(model.variance(other) <= was + 1e-9 for (other, _, _), was in zip(seen, before))
    narrow, mean = [model.variance(features) for features, _, _ in seen], list(model.mean)
    model.relax(share)
    assert model.mean == mean
    for (features, _, _), was in zip(seen, narrow):
        x = dense(features, 6)
        prior = float(x @ covariance @ x)
        assert model.variance(features) == pytest.approx((1 - share) * was + share * prior, rel=1e-6, abs=1e-9)
