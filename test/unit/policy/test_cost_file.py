"""Costs are kept with what they were measured on, and refused anywhere else in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_er.policy import cost_file
from sglang_er.policy.cost_features import Step
from sglang_er.policy.cost_file import StaleCosts
from sglang_er.policy.cost_model import CostModel

HERE = {"device": "cpu", "model": "tiny", "dtype": "bfloat16", "version": "0.1"}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    model = CostModel()
    model.observe_plain(Step(1, 100), 0.01)
    cost_file.save(tmp_path / "costs.json", model, HERE)
    return tmp_path / "costs.json"


def test_costs_come_back(kept):
    assert cost_file.load(kept, HERE).plain(Step(1, 100)) == pytest.approx(0.01)


@pytest.mark.parametrize("name", HERE)
def test_costs_of_another_engine_are_refused_with_the_reason(kept, name):
    with pytest.raises(StaleCosts, match=f"measured with {name} .* this is 'other'") as error:
        cost_file.load(kept, {**HERE, name: "other"})
    assert "\n" not in str(error.value) and "sglang-er calibrate" in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "no file of costs"),
        ('{"format": 0}', "no file of costs"),
        (json.dumps({"format": 1, "measured_on": HERE}), "damaged"),
        (json.dumps({"format": 1, "measured_on": HERE, "model": {"knots": []}}), "damaged"),
        (json.dumps({"format": 1, "measured_on": None}), "measured with device None"),
    ],
)
def test_a_file_that_is_no_such_file_is_refused(tmp_path, content, reason):
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(StaleCosts, match=reason):
        cost_file.load(path, HERE)
