"""`sglang-er simulate` and `plot`: a table, JSON and pictures; mistakes are one line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_er.cli import main as cli

SMALL = ["--requests", "8", "--seeds", "2", "--lengths", "lognormal:40,1,200"]


def simulate(*options: str) -> int:
    return cli.main(["simulate", *options])


def test_a_sweep_gives_a_table_and_json(tmp_path: Path, capsys):
    out = tmp_path / "f.json"
    assert simulate("--sweep", "a100-qwen2.5-7b", *SMALL, "--policy", "fixed:3,paper", "--json", str(out)) == 0
    table = capsys.readouterr().out
    assert "makespan s" in table and "\npaper " in table and "Drafting gains up to a batch of" in table
    content = json.loads(out.read_text())
    assert list(content["policies"]) == ["ar", "fixed:3", "paper", "oracle"]
    assert content["command"] and content["version"]
    assert content["workload"]["requests"] == 8


def test_a_preset_simulates_what_nobody_measured(capsys):
    assert simulate("--preset", "h100", "--model", "0.5b", *SMALL, "--policy", "paper") == 0
    assert "h100, Qwen3-0.6B" in capsys.readouterr().out


def test_every_option_reaches_the_plan(capsys):
    options = [
        "--arrivals",
        "turns:2",
        "--think-seconds",
        "1",
        "--turn-tokens",
        "5",
        "--rollouts",
        "2",
        "--prompt",
        "9",
    ]
    options += ["--alpha", ".9", "--alpha-concentration", "9", "--alpha-decay", ".1", "--alpha-offset-decay", ".1"]
    options += ["--alpha-change", ".5@.5", "--max-running", "4", "--prefill-tokens-per-second", "1e4", "--late", "0"]
    options += ["--noise", ".1", "--outliers", "0", "--thresholds", "1:2", "--gamma-max", "4", "--context", "64"]
    options += ["--whole-steps", "--unseeded", "--private-kv", "80"]
    assert simulate("--sweep", "a100-llama3.1-8b", *SMALL, "--policy", "threshold", *options) == 0
    out = capsys.readouterr().out
    assert "draft length up to 4" in out and "turns:2, at most 4 at once" in out and "0.9, 0.5 after 50%" in out
    assert (
        "a100-llama3.1-8b + 80 ns" in out
        and "16 requests" in out
        and "A seed is 2 rollouts" in out
        and "at context 64" in out
    )


def test_waves_and_a_wrong_start_up_reach_the_policy(tmp_path: Path, capsys):
    costs = []
    for name, error in (("right.json", []), ("wrong.json", ["--seed-error", "8"])):
        options = ["--policy", "goodput", "--arrivals", "waves:2,3", "--json", str(tmp_path / name), *error]
        assert simulate("--sweep", "a100-llama3.1-8b", *SMALL, *options) == 0
        content = json.loads((tmp_path / name).read_text())
        costs.append(content["policies"]["goodput"]["makespans_s"])
    assert content["workload"]["arrivals"] == "waves:2,3" and len(costs[0]) == 2
    assert costs[0] != costs[1]
    assert "16 requests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "choose one of --sweep, --preset and --gpu"),
        (["--sweep", "a", "--preset", "h100"], "choose one of --sweep, --preset and --gpu"),
        (["--sweep", "a100-qwen2.5-7b", "--model", "7b"], "--model goes with --preset and --gpu"),
        (["--preset", "h100", "--private-kv", "1"], "--private-kv goes with --sweep"),
        (["--sweep", "a100-qwen2.5-7b", "--private-kv", "-1"], "--private-kv must be at least 0"),
        (["--sweep", "none.csv"], "--sweep none.csv: no such file"),
        (["--preset", "h100", "--requests", "0"], "--requests must be at least 1"),
        (["--preset", "h100", "--noise", "1"], "--noise must be at least 0 and below 1"),
        (["--preset", "h100", "--prefill-tokens-per-second", "0"], "--prefill-tokens-per-second must be above 0"),
        (["--preset", "h100", "--seed-error", "0"], "--seed-error must be above 0, got 0"),
        (["--preset", "h100", "--seed-error", "2", "--unseeded"], "--seed-error: with --unseeded"),
        (["--preset", "h100", "--arrivals", "waves:2"], "--arrivals waves:2: must be closed, open:RATE"),
        (["--preset", "h100", "--policy", "best"], "--policy best: must be one of"),
        (["--preset", "h100", "--policy", "paper", "--paper-gamma", "6"], "draft length 6 must be a rung"),
        (["--preset", "h100", "--paper-constants", "none.json"], "none.json"),
        (["--preset", "h100", "--thresholds", "4:1,2:3"], "batch sizes must rise"),
        (["--preset", "h100", "--thresholds", "4"], "--thresholds 4: must be BATCH:GAMMA,..."),
        (["--preset", "h100", "--lengths", "none.json"], "none.json"),
        (["--preset", "h100", "--gamma-max", "99"], "--gamma-max 99"),
        (["--sweep", "a100-qwen2.5-7b", "--max-running", "129"], "--max-running 129"),
        (["--preset", "h100", "--json", "no/folder.json"], "there is no folder no"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], words: str, capsys):
    assert simulate(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("sglang-er simulate: ") and words in error and error.count("\n") == 1


def test_what_a_policy_raises_is_no_mistake_of_the_user(monkeypatch):
    def broken(self, state):
        raise ValueError("a bug")

    monkeypatch.setattr("sglang_er.policy.ThresholdPolicy.choose", broken)
    with pytest.raises(ValueError, match="a bug"):
        simulate("--preset", "h100", *SMALL)


def test_pictures(tmp_path: Path):
    pytest.importorskip("matplotlib")
    out, line, gains = tmp_path / "f.json", tmp_path / "line.png", tmp_path / "map.png"
    assert simulate("--preset", "cpu", "--model", "0.5b", *SMALL, "--json", str(out)) == 0
    assert cli.main(["plot", "timeline", str(out), "--policy", "ar,oracle", "--png", str(line)]) == 0
    small = ["--batches", "1,4", "--contexts", "256,512"]
    assert cli.main(["plot", "map", "--sweep", "a100-llama3.1-8b", "--alpha", ".9", *small, "--png", str(gains)]) == 0
    for picture in (line, gains):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("choose one of", ["map", "--alpha", ".9"]),
        ("--alpha must be between 0 and 1", ["map", "--preset", "h100", "--alpha", "2"]),
        ("reaches batches of 1 to 128", ["map", "--sweep", "a100-qwen2.5-7b", "--alpha", ".9", "--batches", "500"]),
        ("not what `sglang-er simulate --json` writes", ["timeline", "FILE"]),
    ],
)
def test_a_picture_that_cannot_be_is_one_line(words: str, arguments: list[str], tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "x.json").write_text("{}")
    arguments = [str(tmp_path / "x.json") if argument == "FILE" else argument for argument in arguments]
    assert cli.main(["plot", *arguments, "--png", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sglang-er plot: ") and words in error and error.count("\n") == 1
