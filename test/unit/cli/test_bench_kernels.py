"""`sglang-er bench kernels`: what its options mean, and one line for every mistake."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from sglang_er import kernels
from sglang_er.cli import bench_kernels
from sglang_er.cli import main as cli


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_kernels.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.fixture(autouse=True)
def settings_stay():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    kernels.set_isa("auto")


def test_the_default_is_both_models_of_the_promises():
    plan = bench_kernels.plan_of(arguments())
    assert list(plan.models) == ["0.5b", "1.5b"] and list(plan.batches) == [1, 8, 32]
    assert list(plan.contexts) == [1024, 8192] and plan.parts == ["linear", "quantize_pack", "attention", "overhead"]


def test_layers_of_ones_own_replace_the_models():
    plan = bench_kernels.plan_of(arguments("--shape", "64x128", "--shape", "32X64"))
    assert [(layer.rows, layer.cols) for layer in plan.layers] == [(64, 128), (32, 64)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--parts", "linear,nothing"], "--parts nothing: choose among"),
        (["--isas", "sse"], "--isas sse: this machine has"),
        (["--clock", "cpu"], "add --threads 1"),
        (["--models", "3b"], "no size for --arch qwen3 --shape 3b"),
        (["--json", "nowhere/x.json"], "there is no folder"),
    ],
)
def test_a_choice_that_cannot_be_is_one_line_and_exit_2(words, said, capsys):
    assert bench_kernels.run(arguments(*words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("sglang-er bench kernels: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["--batches", "0"], ["--shape", "12"], ["--device", "tpu"]])
def test_what_argparse_can_tell_it_tells(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "kernels", *words])
    assert stopped.value.code == 2


def test_a_small_run_prints_the_table_and_writes_the_file(tmp_path: Path, capsys):
    path = tmp_path / "k.json"
    words = ["--shape", "64x128", "--batches", "1", "--parts", "linear,quantize_pack", "--threads", "1"]
    assert cli.main(["bench", "kernels", *words, "--repeats", "1", "--footprint", "1", "--json", str(path)]) == 0
    assert "64x128" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["what"] == "kernels" and found["threads"] == 1 and found["attention"] == []
