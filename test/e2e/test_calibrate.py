"""Hypothesis: costs that a real server measured are kept in a file that only an equal server accepts.

Method: `sglang-er calibrate` against the `spec` server. Symptom of a defect: no file, costs that do not rise with the
batch, a policy that is another one afterwards, a file that anybody takes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.server import Server

from sglang_er.cli import main as cli
from sglang_er.config import RolloutConfig
from sglang_er.engine.controller import Controller
from sglang_er.policy.cost_features import Step
from sglang_er.policy.cost_file import StaleCosts

pytestmark = pytest.mark.server


def test_costs_are_kept_for_an_equal_server_only(
    spec: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec.fixed(2)
    before = spec.state()["policy"]
    out = tmp_path / "costs.json"
    assert cli.main(["calibrate", "--url", spec.url, "--out", str(out), "--seconds", "8"]) == 0
    said = capsys.readouterr().out
    assert "requests" in said and "gamma 7" in said and str(out) in said
    assert spec.state()["policy"] == before

    measured_on = spec.state()["controller"]["costs"]["measured_on"]
    assert {"device", "model", "dtype", "threads", "ranks", "version"} <= set(measured_on)
    config = RolloutConfig(policy="goodput", cost_file=str(out))
    cost = Controller(config, measured_on).learnt.cost
    assert cost.ready and 1e-4 < cost.plain(Step(1, 128)) < 1.0
    assert cost.step(Step(1, 128), 7) > cost.step(Step(1, 128), 1)
    with pytest.raises(StaleCosts, match="measured with dtype"):
        Controller(config, {**measured_on, "dtype": "float16"})


@pytest.mark.parametrize(
    ("words", "complaint", "code"),
    [
        (["--seconds", "0"], "--seconds must be above 0", 2),
        (["--out", "nowhere/costs.json"], "there is no folder nowhere", 2),
        (["--url", "http://127.0.0.1:9"], "Connection refused", 1),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str, code: int
) -> None:
    usual = ["--url", "http://127.0.0.1:9", "--out", str(tmp_path / "costs.json")]
    assert cli.main(["calibrate", *usual, *words]) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and complaint in said[0] and said[0].startswith("sglang-er calibrate: ")
