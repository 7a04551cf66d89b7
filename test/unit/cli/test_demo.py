"""`sglang-er demo` around the measurement: the model's cache, exit codes, one line for every mistake."""

from __future__ import annotations

import argparse
import io
from types import SimpleNamespace

import pytest

from sglang_er.cli import demo
from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.progress import Progress


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (RolloutError("the server ended"), 1, "the server ended"),
        (ValueError("no checkpoint there"), 2, "no checkpoint there"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_failure_is_one_line_with_its_exit_code(outcome, code, said, monkeypatch, capsys):
    def fails(args, progress):
        raise outcome

    monkeypatch.setattr(demo, "_demonstrate", fails)
    assert demo.run(arguments()) == code
    error = capsys.readouterr().err
    assert error.startswith("sglang-er demo: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(("wrong", "code"), [(0, 0), (1, 1)])
def test_wrong_outputs_fail_the_demo(wrong, code, monkeypatch):
    report = SimpleNamespace(text=lambda: "the table", equality=SimpleNamespace(wrong=wrong))
    monkeypatch.setattr(demo, "_demonstrate", lambda args, progress: report)
    assert demo.run(arguments()) == code


def test_a_batch_without_rollouts_is_refused_before_anything_is_made(made, capsys):
    assert demo.run(arguments("--rollouts", "0")) == 2
    assert "--rollouts must be at least 1" in capsys.readouterr().err
    assert not made


def test_progress_in_a_log_is_whole_lines_now_and_then():
    log = io.StringIO()
    progress = Progress(log)
    for _ in range(100):
        progress.update("moving")
    progress.note("done")
    progress.close()
    lines = log.getvalue().splitlines()
    assert len(lines) <= 2 and lines[-1].endswith("done") and "\r" not in log.getvalue()
