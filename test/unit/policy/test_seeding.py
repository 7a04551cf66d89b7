"""What is timed at start-up: as much as fits, and enough to know the sizes that were not."""

from __future__ import annotations

import random

import pytest

from sglang_er.policy import GoodputPolicy, StepState, seeding
from sglang_er.policy.cost_features import Step
from sglang_er.policy.cost_model import CostModel


class Machine:
    """`rows` from which arithmetic bounds a pass, and seconds of a plain step of one row."""

    def __init__(self, knee: float, plain: float) -> None:
        self.knee, self.plain = knee, plain
        self.rng = random.Random(0)
        self.spent = 0.0

    def seconds(self, kind: str, size: int, gamma: int) -> float:
        share = 0.25 if kind == "draft" else 1.0
        return share * self.plain * max(1.0, size * (gamma + 1) / self.knee)

    def measure(self, kind: str, size: int, gamma: int) -> float:
        found = self.seconds(kind, size, gamma) * self.rng.gauss(1.0, 0.02)
        self.spent += found
        return found


@pytest.mark.parametrize("plain", [0.005, 0.06, 0.5])
def test_as_much_is_timed_as_fits(plain: float):
    machine = Machine(4.0, plain)
    timings = seeding.time_forwards(machine.measure, seeding.SIZES, 7, 3.0)
    assert machine.spent < 3.0 * 1.1
    sizes = {step.rows for kind, step, _, _ in timings if kind == "plain"}
    assert sizes == {0.005: {1, 4, 16, 64}, 0.06: {1, 4, 16}, 0.5: {1}}[plain]
    assert {kind for kind, *_ in timings} >= {"plain", "draft"}


def test_the_first_run_of_a_short_pass_is_no_timing():
    """It makes what is made at first use."""
    seen: dict[tuple[str, int, int], int] = {}

    def measure(*asked: object) -> float:
        seen[asked] = seen.get(asked, 0) + 1  # type: ignore[index]
        return 0.5 if seen[asked] == 1 else 0.01  # type: ignore[index]

    timings = seeding.time_forwards(measure, (1, 4), 3, 60.0)
    assert {seconds for *_, seconds in timings if seconds < 0.5} == {0.01}
    assert [seconds for kind, step, _, seconds in timings if (kind, step.rows) == ("plain", 1)] == [0.01, 0.01]


def test_nothing_is_drafted_where_nothing_can_be():
    machine = Machine(4.0, 0.01)
    timings = seeding.time_forwards(machine.measure, (1, 4), 0, 3.0)
    assert {kind for kind, *_ in timings} == {"plain"}


@pytest.mark.parametrize("knee", [2.0, 6.0, 24.0, 500.0])
def test_the_trend_goes_on_behind_what_was_timed(knee: float):
    """A prior with a slope of its own said a quarter of what 128 rows took: 7 drafts were tried for 16 requests."""
    machine, model = Machine(knee, 0.06), CostModel()
    seeding.seed(model, seeding.time_forwards(machine.measure, (1, 4, 16), 7, 60.0))
    for size, gamma in ((8, 7), (16, 7), (32, 3), (64, 0)):
        step, truth = Step(size, size * 64), machine.seconds("verify", size, gamma)
        said = model.verify(step, gamma) if gamma else model.plain(step)
        assert said == pytest.approx(truth, rel=0.3), (size, gamma)


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_a_machine_without_arithmetic_to_spare_drafts_nothing_in_a_large_batch(size: int):
    machine = Machine(2.0, 0.06)
    policy = GoodputPolicy(7)
    seeding.seed(policy.cost, seeding.time_forwards(machine.measure, seeding.SIZES, 7, 3.0))
    assert policy.choose(StepState(size, size * 100, 7, size)) == 0
    assert policy.choose(StepState(1, 100, 7, 1)) > 0
