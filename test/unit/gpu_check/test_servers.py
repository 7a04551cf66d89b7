"""The servers of the GPU check: their flags, and who is started, kept, stopped and killed; with pretended servers."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.server import Server

from sglang_er import config
from sglang_er.cli import serve
from sglang_er.config import RolloutConfig
from sglang_er.engine import algorithm

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from gpu import ingredients, longtail, rollouts, servers
from gpu.sections import Options, Skip
from gpu.servers import KINDS, Servers, flags_of

GPU = Options(Path())


def parsed(flags: Sequence[str]) -> tuple[argparse.Namespace, RolloutConfig, bool]:
    """What SGLang and we understand of the flags of `serve`, and whether they draft as we do."""
    from sglang.srt.server_args import ServerArgs

    ours, theirs = argparse.ArgumentParser(allow_abbrev=False), argparse.ArgumentParser(allow_abbrev=False)
    serve.add_arguments(ours)
    ServerArgs.add_cli_args(theirs)
    mine, others = ours.parse_known_args(["--model-path", "model", *flags])
    args = theirs.parse_args(["--model-path", "model", *others])
    return args, config.from_flags(mine), not mine.plain and args.speculative_algorithm is None


@pytest.mark.parametrize("options", [GPU, Options(Path(), eager=True), Options(Path(), cuda_graph=True)])
@pytest.mark.parametrize("name", KINDS)
def test_the_flags_start_a_server(name: str, options: Options, monkeypatch: pytest.MonkeyPatch):
    """On a GPU: SGLang knows every one, and what is refused before the weights are loaded is not asked for."""
    for variable, value in KINDS[name].env.items():
        monkeypatch.setenv(variable, value)
    args, resolved, drafts = parsed(flags_of(KINDS[name], options, Path("model")))
    assert args.device == "cuda" and args.attention_backend == KINDS[name].attention
    assert args.speculative_draft_model_path in (None, "model")
    assert drafts == KINDS[name].ours
    if drafts:
        algorithm._validate_gpu(args, resolved)
        assert resolved.kernels == "cuda,triton,reference"
        assert resolved.draft_graphs == ("eager" if args.disable_cuda_graph else "on")


def test_the_ingredients_server_starts():
    args, resolved, drafts = parsed(ingredients.SERVER_FLAGS)
    assert drafts and args.disable_cuda_graph
    algorithm._validate_gpu(args, resolved)
    assert (resolved.kernels, resolved.draft_graphs) == ("cuda,triton,reference", "eager")


def test_what_an_attention_backend_needs_is_looked_for(tmp_path: Path):
    """No kernel of a GPU's is installed here: skipped with the reason, not started in vain."""
    assert servers._lacks(KINDS["7b"]) is None
    with pytest.raises(Skip, match=r"no sgl_kernel\.flash_ops here, which fa3 needs"):
        Servers(Options(tmp_path)).get("bf16 fa3")


def test_exactness_is_checked_without_graphs_unless_they_are_asked_for():
    eager = "--disable-cuda-graph"
    assert eager in flags_of(KINDS["fp32"], GPU, Path())
    assert eager not in flags_of(KINDS["fp32"], Options(Path(), cuda_graph=True), Path())
    assert eager not in flags_of(KINDS["7b"], GPU, Path())
    assert eager in flags_of(KINDS["7b"], Options(Path(), eager=True), Path())
    assert "cuda" not in flags_of(KINDS["fp32"], Options(Path(), dry_run=True), Path())


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was started and stopped; a `server` is a process that sleeps."""
    events: list[str] = []

    @contextmanager
    def running(model: Path, log: Path, *flags: str, env: dict[str, str]) -> Iterator[Server]:
        if "NGRAM" in flags:
            raise AssertionError("the server ended with 1:\nno such algorithm")
        events.append(f"start {log.stem}")
        log.write_text("")
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        try:
            yield Server("http://localhost", log, process)
        finally:
            events.append(f"stop {log.stem}")
            process.kill()
            process.wait()

    monkeypatch.setattr(servers, "running_server", running)
    monkeypatch.setattr(servers, "made", lambda model: Path("model"))
    return events


def test_a_server_is_shared_until_another_kind_is_asked_for(started: list[str], tmp_path: Path):
    some = Servers(Options(tmp_path))
    with some.watched(60):
        assert some.get("7b") is some.get("7b")
        some.get("1.5b")
    some.stop()
    assert started == ["start server-7b", "stop server-7b", "start server-1.5b", "stop server-1.5b"]
    assert not list(tmp_path.iterdir())  # the logs of servers that were well are gone


def test_one_server_stands_for_all_in_a_dry_run(started: list[str], tmp_path: Path):
    some = Servers(Options(tmp_path, dry_run=True))
    assert some.get("fp32") is some.get("7b")
    some.stop()
    assert started == ["start server-fp32", "stop server-fp32"]


def test_a_server_that_does_not_start_is_tried_once(started: list[str], tmp_path: Path):
    some = Servers(Options(tmp_path))
    with pytest.raises(AssertionError, match="no such algorithm"):
        some.get("7b ngram")
    with pytest.raises(Skip, match="no such algorithm"):
        some.get("7b ngram")
    assert started == []


def test_a_server_that_hangs_is_killed_and_the_next_cell_gets_another(started: list[str], tmp_path: Path):
    some = Servers(Options(tmp_path))
    with some.watched(0.3):
        first = some.get("7b")
        assert first.process.wait(10) < 0
    with some.watched(60):
        second = some.get("7b")
        time.sleep(0.5)
        assert second is not first and second.process.poll() is None
    second.process.kill()
    second.process.wait()
    some.stop()
    assert second.log.exists()


def test_a_given_server_is_used_for_everything(started: list[str], tmp_path: Path):
    some = Servers(Options(tmp_path, url="http://localhost:1"))
    with some.watched(0.01):
        time.sleep(0.05)
        assert some.get("7b").url == "http://localhost:1"
    some.stop()
    assert some.get("fp32").url == "http://localhost:1" and started == []


def test_the_grid_begins_with_what_tells_most_and_holds_no_more_than_a_million_tokens():
    grid = rollouts.grid()
    assert grid[:3] == (("7b", 1, 1024), ("7b", 16, 8192), ("7b", 64, 16384))
    assert len(set(grid)) == len(grid) == 2 * (3 * 5 - 1) + 2 * 3
    assert grid[-6:] == tuple((f"7b {kind}", *size) for kind in ("fa3", "flashinfer") for _, *size in grid[:3])
    assert max(batch * size for _, batch, size in grid) == 1 << 20


def test_the_long_tail_rollout_has_eight_samples_a_prompt_and_the_length_of_the_paper():
    requests = longtail.rollout(dry_run=False, task_text=False)
    lengths = [request.output_tokens for request in requests]
    assert len(requests) == 128 and len({request.input_ids for request in requests}) == 16
    assert requests[0].input_ids == requests[7].input_ids != requests[8].input_ids
    assert abs(sum(lengths) / 128 - 650) < 1 and 6 * 650 < max(lengths) <= 8192


def test_the_papers_rule_becomes_the_batch_from_which_it_drafts():
    from sglang_er.policy.base import StepState
    from sglang_er.policy.paper import PaperPolicy
    from sglang_er.rollout import roofline

    constants = roofline.make("h200", "7b").paper_constants()
    limit = longtail.paper_batch(constants)
    assert 1 < limit < 128
    for batch, drafts in ((limit + 1, False), (limit, True)):
        policy = PaperPolicy(constants, ramp=0)
        state = StepState(batch, batch * longtail.PAPER_CONTEXT, 15, batch)
        assert policy.choose(state) == 0  # the step that switches is a plain one
        assert (policy.choose(state) > 0) == drafts
