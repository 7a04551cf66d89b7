"""`sglang-er bench rollout` around the measurement: options, sizes, exit codes, one line for every mistake."""

from __future__ import annotations

import argparse
import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from sglang_er.cli import bench_rollout
from sglang_er.cli import main as cli
from sglang_er.rollout import timeline
from sglang_er.rollout.errors import RolloutError


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_rollout.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}),
        (["--gamma", "2"], {"policy": "fixed", "gamma": 2}),
        (["--thresholds", "2:3,4:1"], {"policy": "threshold", "thresholds": "2:3,4:1"}),
        (["--policy", "threshold"], {"policy": "threshold"}),
        (["--policy", "cycle", "--gamma", "2"], {"policy": "cycle", "gamma": 2}),
    ],
)
def test_the_policy_is_what_the_options_say_and_imply(words, changes):
    assert bench_rollout.policy_changes(arguments(*words)) == changes


def test_sizes_of_a_closed_loop():
    assert bench_rollout.output_lengths(arguments()) == [[128]]
    assert bench_rollout.output_lengths(arguments("--batch", "4", "--output", "9")) == [[9] * 4]
    assert bench_rollout.output_lengths(arguments("--requests", "6", "--seeds", "2")) == [[128] * 6] * 2


def test_sizes_of_a_length_file():
    every = bench_rollout.output_lengths(arguments("--lengths", "longtail"))
    assert [len(batch) for batch in every] == [32] * 10
    some = bench_rollout.output_lengths(arguments("--lengths", "longtail", "--seeds", "2", "--requests", "5"))
    assert some == [batch[:5] for batch in every[:2]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--blocks", "3"], "an even number"),
        (["--temperature", "-1"], "must not be negative"),
        (["--lengths", "longtail", "--output", "5"], "exclude each other"),
        (["--lengths", "longtail", "--seeds", "11"], "has 10 batches"),
        (["--lengths", "longtail", "--requests", "33"], "has 32 lengths"),
        (["--lengths", "nowhere.json"], "nowhere.json"),
        (["--gamma", "1", "--thresholds", "1:1"], "exclude each other"),
        (["--url", "http://x", "--shape", "tiny"], "exclude each other"),
        (["--model-path", "nowhere"], "no checkpoint there"),
        (["--json", "nowhere/x.json"], "there is no folder"),
    ],
)
def test_a_choice_that_cannot_be_is_one_line_and_exit_2(words, said, capsys):
    assert bench_rollout.run(arguments(*words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("sglang-er bench rollout: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(("outcome", "code"), [(RolloutError("the server ended"), 1), (KeyboardInterrupt(), 130)])
def test_a_failure_is_one_line_with_its_exit_code(outcome, code, monkeypatch, capsys):
    def fails(args, progress):
        raise outcome

    monkeypatch.setattr(bench_rollout, "_measure", fails)
    assert bench_rollout.run(arguments()) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setattr(timeline.util, "find_spec", lambda name: None)
    assert bench_rollout.run(arguments("--png", "x.png")) == 2
    assert "matplotlib" in capsys.readouterr().err


def test_the_kv_cache_holds_the_largest_batch():
    assert bench_rollout.kv_tokens([[10]], 10, 1) == bench_rollout.KV_AT_LEAST
    size = bench_rollout.kv_tokens([[100] * 32, [1000] * 32], 256, 16)
    assert size % 1024 == 0 and size >= 16 * (256 + 1000) + 32 * 256


def test_figures_go_to_the_table_and_to_the_file(counting_server, monkeypatch, tmp_path: Path, capsys):
    @contextmanager
    def server(args, progress, kv):
        yield counting_server, {"shape": "tiny", "arch": "qwen3", "sizes_of": "none", "alpha": 0.9}, lambda: 0.0

    monkeypatch.setattr(bench_rollout, "bench_server", server)
    path = tmp_path / "out.json"
    words = ["bench", "rollout", "--batch", "2", "--output", "12", "--blocks", "2", "--gamma", "2", "--json", str(path)]
    assert cli.main(words) == 0
    found = json.loads(path.read_text())
    assert found["model"] == {
        "name": "qwen3 tiny, layer sizes of none", "alpha_stated": 0.9, "prompts": "task text"
    }  # fmt: skip
    assert found["policy"]["gamma"] == 2 and found["oracle"] is None
    assert "speed-up, median pair" in capsys.readouterr().out
