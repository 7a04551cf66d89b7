"""`sglang-er serve` fills in what only the running machine knows, and nothing that anybody chose."""

from __future__ import annotations

import argparse
import os

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_er import config
from sglang_er.cli import serve
from sglang_er.engine import host, launch
from sglang_er.rollout import cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "default_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("forwarded", "threads"),
    [
        ([], 8),
        (["--dp-size", "2"], 4),
        (["--data-parallel-size=3"], 2),
        (["--dp-size", "16"], 1),
        (["--tp-size", "2"], 4),
        (["--tp", "2", "--dp-size", "2"], 2),
        (["--tp=2", "--dp=2"], 2),
        (["--dp", "4"], 2),
        (["--data-parallel-size", "4"], 2),
        (["--tensor-parallel-size", "4"], 2),
        (["--tensor-parallel=4", "--device", "cpu", "--dtype", "auto"], 2),
        (["--dp-size", "x"], 8),
    ],
)
def test_engines_share_the_cores(forwarded, threads):
    resolved = serve.with_threads(config.resolve(), forwarded)
    assert resolved.cpu_threads == threads
    assert resolved.set_by()["cpu_threads"] == "default"


@pytest.mark.parametrize("field", ["dp_size", "tp_size"])
def test_every_spelling_of_sglangs_parser_is_known(field):
    """Its option strings and the abbreviations that it takes for them."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    names = [name for action in parser._actions if action.dest == field for name in action.option_strings]
    assert f"--{field.replace('_', '-')}" in names
    for name in (*names, f"--{field.removesuffix('_size')}"):
        words = [name, "4"]
        assert getattr(parser.parse_args(["--model-path", "m", *words]), field) == 4
        assert serve.with_threads(config.resolve(), words).cpu_threads == 2, name


def test_the_processes_of_the_server_get_the_same_and_know_that_it_is_a_default():
    handed = config.to_env(serve.with_threads(config.resolve(env={"SGLANG_ER_GAMMA": "2"}), []))
    child = config.from_env(handed)
    assert child.cpu_threads == 8 and child.set_by()["cpu_threads"] == "default"
    assert child.gamma == 2 and child.set_by()["gamma"] == "environment"


def test_a_choice_stands(monkeypatch):
    chosen = config.resolve(env={"SGLANG_ER_CPU_THREADS": "3"})
    assert serve.with_threads(chosen, []).cpu_threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert serve.with_threads(config.resolve(), []).cpu_threads is None


@pytest.mark.parametrize(
    ("given", "spin"),
    [({}, host.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_of_a_server_on_a_cpu_spin_for_a_moment_unless_somebody_chose(given, spin, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "SGLANG_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ, **given})
    launch.prepare_environment(on_cpu=True)
    assert os.environ.get("GOMP_SPINCOUNT") == spin
