"""The table says what was measured, a slow-down included."""

from __future__ import annotations

import pytest

from sglang_er.rollout import report
from sglang_er.rollout.equality import Difference, Equality
from sglang_er.rollout.machine import Machine
from sglang_er.rollout.measure import Block, Comparison
from sglang_er.rollout.steps import Steps
from sglang_er.rollout.workload import make_batch

QUIET = Machine("CPU of a test", 4, (0.5, 0.5, 0.5))
EQUAL = Equality([None, None], 96)


def block(rate: float, gamma: int, accepted: int = 0) -> Block:
    steps = Steps({gamma: 10}, 10, 10 + accepted, accepted, 10 if gamma else 0)
    return Block(2.0, 4.0, int(rate * 2), [1.0, 0.0], 1, steps)


def text(plain: float, speculative: float, equality: Equality = EQUAL, machine: Machine = QUIET) -> str:
    comparison = Comparison([block(plain, 0)] * 2, [block(speculative, 3, accepted=20)] * 2)
    return report.Report("qwen3 0.5b", 0.95, machine, "gamma 3 always", make_batch(8), comparison, equality).text()


def test_every_figure_of_the_table_is_there():
    said = text(10, 20)
    for part in (
        "10.0",
        "20.0",
        "2.00x",
        "5.0",
        "3: 100%",
        "3.00",
        "0.50 (2 of 4)",
        "2 of 4",
        "yes",
        "0.950",
        QUIET.cpu,
    ):
        assert part in said
    assert "2.00 times as fast" in said and "SLOWER" not in said


@pytest.mark.parametrize(("rate", "words"), [(8, "SLOWER"), (10, "no noticeable"), (13, "times as fast")])
def test_the_verdict_follows_the_measurement(rate, words):
    assert words in text(10, rate)


def test_a_busy_machine_is_named():
    assert "other programs" not in text(10, 20)
    assert "other programs" in text(10, 20, machine=Machine("c", 2, (9.0, 9.0, 9.0)))


def test_a_near_tie_is_explained_and_no_longer_called_equal():
    said = text(10, 20, Equality([None, Difference(7, 0.03)], 96))
    assert "1 of 2 equal" in said and "0.030 nats" in said and "no, see below" in said and "wrong" not in said


@pytest.mark.parametrize("gap", [None, 3.0])
def test_a_difference_that_is_no_near_tie_is_called_wrong(gap):
    equality = Equality([None, Difference(7, gap)], 96)
    assert equality.wrong == 1
    assert "outputs are wrong" in text(10, 20, equality)


def test_table_columns_line_up():
    lines = report.table([("", "plain"), ("a long name", "1"), ("b", "222222")])
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"policy": "fixed", "gamma": 2}, "gamma 2 always"),
        ({"policy": "threshold", "thresholds": [[1, 5], [4, 3]]}, "gamma by batch size: 5 up to 1, 3 up to 4, 0 above"),
        ({"policy": "cycle", "schedule": [0, 1]}, "policy cycle, schedule [0, 1]"),
    ],
)
def test_a_policy_is_named_as_it_runs(policy, said):
    assert report.policy_text(policy) == said
