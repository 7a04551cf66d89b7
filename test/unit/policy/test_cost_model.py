"""The cost model finds a machine's costs from its steps, however wrong it was before, and survives bad times."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_er.policy import seeding
from sglang_er.policy.cost_features import Step
from sglang_er.policy.cost_model import CostModel
from sglang_er.policy.linear_model import LinearModel


def plain_cost(rows: int, context: int) -> float:
    return 0.010 * max(1.0, rows / 48) + 2e-8 * context


def draft_cost(rows: int, context: int) -> float:
    return 0.004 * max(1.0, rows / 24) + 2e-8 * context


def fed(steps: int = 600, noise: float = 0.02, split: bool = True, slow: float = 1.0, seed: int = 0) -> CostModel:
    """A model that saw a rollout: batches from 64 down to 1, draft lengths 0 to 7."""
    rng, model = random.Random(seed), CostModel()
    for index in range(steps):
        rows = max(1, round(64 * (1 - index / steps)))
        step, gamma = Step(rows, rows * (300 + index)), rng.choice([0, 1, 3, 5, 7])
        draft = gamma * draft_cost(*step) * rng.gauss(1, noise) * slow
        target = plain_cost(rows * (gamma + 1), step.context) * rng.gauss(1, noise) * slow
        if gamma:
            model.observe_speculative(step, step, gamma, draft + target, draft if split else math.nan)
        else:
            model.observe_plain(step, target)
    return model


@pytest.mark.parametrize("split", [True, False])
def test_costs_are_found_from_the_steps_of_a_rollout(split):
    model = fed(split=split)
    for rows in (1, 4, 16, 40):
        step = Step(rows, rows * 600)
        for gamma in (0, 1, 3, 7):
            truth = plain_cost(rows * (gamma + 1), step.context) + gamma * draft_cost(*step)
            assert model.step(step, gamma) == pytest.approx(truth, rel=0.12), (rows, gamma)


def test_the_parts_of_a_step_are_told_apart_where_the_draft_pass_is_timed():
    model = fed()
    step = Step(2, 1200)
    assert model.draft(step) == pytest.approx(draft_cost(*step), rel=0.08)
    assert model.verify(step, 5) == pytest.approx(plain_cost(12, 1200), rel=0.08)


def test_uncertainty_falls_with_evidence_and_is_larger_where_nothing_was_seen():
    fresh, model = CostModel(), CostModel()
    for each in (fresh, model):
        each.observe_plain(Step(8, 4000), 0.01)
    for _ in range(50):
        model.observe_speculative(Step(8, 4000), Step(8, 4000), 3, 0.03, 0.012)
    assert model.deviation(Step(8, 4000), 3, 0, 8) < 0.3 * fresh.deviation(Step(8, 4000), 3, 0, 8)
    assert model.deviation(Step(8, 4000), 3, 0, 8) < model.deviation(Step(64, 32000), 7, 0, 64)


def test_a_measurement_at_one_size_moves_its_neighbours():
    model = CostModel()
    model.observe_plain(Step(8, 4000), 0.01)
    before = model.verify(Step(2, 1000), 1)
    for _ in range(20):
        model.observe_speculative(Step(2, 1000), Step(2, 1000), 3, 0.040, 0.01)
    assert model.verify(Step(2, 1000), 1) > 1.5 * before


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_times_that_are_no_times_are_ignored_and_counted(bad):
    model = fed(100)
    step = Step(4, 2000)
    before, ignored = model.curve(step, 7, 4), model.ignored
    model.observe_plain(step, bad)
    model.observe_speculative(step, step, 3, bad, 0.01)
    assert model.curve(step, 7, 4) == before and model.ignored == ignored + 2


def test_a_draft_pass_longer_than_its_step_is_ignored():
    model = fed(100)
    before = model.ignored
    model.observe_speculative(Step(4, 2000), Step(4, 2000), 3, 0.01, 0.02)
    assert model.ignored == before + 1


def test_rare_outliers_move_little():
    model, rng = CostModel(), random.Random(0)
    for _ in range(400):
        model.observe_plain(Step(8, 4000), 0.01 * rng.gauss(1, 0.02) * (20 if rng.random() < 0.02 else 1))
    assert model.plain(Step(8, 4000)) == pytest.approx(0.01, rel=0.08)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_machine_that_changes_its_pace_is_followed(factor):
    model = fed(400)
    step, rng = Step(8, 4000), random.Random(1)
    for _ in range(150):
        model.observe_plain(step, factor * plain_cost(*step) * rng.gauss(1, 0.02))
    assert model.plain(step) == pytest.approx(factor * plain_cost(*step), rel=0.1)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 300),
            st.integers(0, 10**7),
            st.integers(0, 7),
            st.floats(allow_nan=True, allow_infinity=True, width=32),
            st.floats(allow_nan=True, width=32),
        ),
        max_size=60,
    )
)
def test_answers_are_finite_and_positive_whatever_was_observed(steps):
    model = CostModel()
    model.observe_plain(Step(1, 100), 0.01)
    for rows, context, gamma, seconds, draft_seconds in steps:
        step = Step(rows, context)
        if gamma:
            model.observe_speculative(step, step, gamma, seconds, draft_seconds)
        else:
            model.observe_plain(step, seconds)
    for rows in (1, 7, 5000):
        for seconds in model.curve(Step(rows, rows * 100), 7, rows):
            assert math.isfinite(seconds) and seconds > 0
        assert math.isfinite(model.deviation(Step(rows, rows * 100), 3, 0, rows))


def test_memory_does_not_grow():
    def size(model: CostModel) -> int:
        return len(json.dumps(model.to_json()))

    assert size(fed(2000)) < 1.1 * size(fed(200))


def test_a_saved_model_answers_the_same_and_is_uncertain_again():
    model = fed()
    kept = CostModel.from_json(json.loads(json.dumps(model.to_json())))
    step = Step(4, 2000)
    assert kept.curve(step, 7, 4) == pytest.approx(model.curve(step, 7, 4))
    assert kept.deviation(step, 3, 0, step.rows) > model.deviation(step, 3, 0, step.rows)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("scale"),
        lambda content: content.update(scale=-1.0),
        lambda content: content.update(knots=[1, 2]),
        lambda content: content["weights"].update(draft=[1.0]),
        lambda content: content["weights"]["target"].__setitem__(0, math.nan),
        lambda content: content.update(weights=3),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[dict], object]):
    content = fed(50).to_json()
    damage(content)
    with pytest.raises(ValueError):
        CostModel.from_json(content)


def test_seeds_come_in_any_order():
    model = CostModel()
    step = Step(1, 100)
    seeding.seed(model, [("verify", step, 3, 0.011), ("draft", step, 0, 0.004), ("plain", step, 0, 0.01)])
    assert model.ready and model.observed == {"plain": 1, "draft": 1, "verify": 1}


def test_the_linear_model_is_least_squares():
    """Against the closed form in two unknowns."""
    model = LinearModel([0.0, 0.0], [[100.0, 0.0], [0.0, 100.0]])
    points = [(1.0, 2.1), (2.0, 3.9), (3.0, 6.2), (4.0, 7.8)]
    for x, y in points:
        features = [(0, 1.0), (1, x)]
        model.update(features, y - model.predict(features), 0.01)
    # Slope and intercept of the ordinary least squares line through these points.
    assert model.mean == pytest.approx([0.15, 1.94], abs=0.02)
    assert model.variance([(0, 1.0), (1, 2.5)]) < 0.01
    model.relax(1.0)
    assert model.triangle == [[100.0], [0.0, 100.0]]
