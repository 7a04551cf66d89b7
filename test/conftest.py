"""Fixtures for the whole suite. Real servers are shared: each is started at most once per session.

The seven servers are a pairwise cover of the start-time options (docs/development.md has the table).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# No GPU here: Triton kernels run under its interpreter, which triton must know before anybody imports it. Servers start
# without it (support/server.py).
os.environ.setdefault("TRITON_INTERPRET", "1")

from support.equality import greedy
from support.prompts import mixed_prompts
from support.server import Server, areal_command, framework_command, running_server, serve_command

from sglang_er.compat import torchvision_shim

# Tests import SGLang and transformers, which import torchvision (see the shim).
torchvision_shim.install()

CONTEXT_LENGTH = 512


@dataclass(frozen=True)
class ServerSpec:
    """How a shared server is started: `arch` and `seed` of its flat model, flags, environment."""

    arch: str = "qwen3"
    seed: int = 0
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    command: Callable[..., list[str]] = serve_command


# Servers import test helpers (mutants, custom processors) by name.
_TEST_PATH = {"PYTHONPATH": str(Path(__file__).parent)}
_COMMON = ("--dtype", "float32", "--context-length", str(CONTEXT_LENGTH), "--random-seed", "1")

SERVERS = {
    # The fair baseline: no speculation; seeds honoured, so it is the reference of the seeded tests too.
    "plain": ServerSpec(flags=("--plain", "--enable-deterministic-inference", "--max-total-tokens", "16384")),
    # Overlap, page size 1, chunked prefill; starts on other weights (seed 1): tests update it to seed 0 first.
    "spec": ServerSpec(
        seed=1,
        flags=(
            *("--chunked-prefill-size", "64", "--max-total-tokens", "16384", "--enable-custom-logit-processor"),
            "--enable-metrics",
        ),
        env={"SGLANG_ER_TEST_HOOK": "support.mutants:install", **_TEST_PATH},
    ),
    # Deterministic inference: per-request seeds. Nothing of ours is called to start it: the name must resolve early.
    "seeded": ServerSpec(
        flags=(
            *("--enable-deterministic-inference", "--max-total-tokens", "16384", "--sleep-on-idle"),
            *("--speculative-algorithm", "EFFICIENT_ROLLOUT"),
        ),
        env=_TEST_PATH,
        command=framework_command,
    ),
    # Page size 16, no overlap, a pool so small that decoding requests are retracted.
    "paged": ServerSpec(
        arch="llama",
        flags=(
            *("--page-size", "16", "--disable-overlap-schedule", "--max-total-tokens", "2048"),
            *("--chunked-prefill-size", "64"),
        ),
        env={"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "20"},
    ),
    # Experts, on two ranks; no overlap and no retraction (SGLang forgets penalties in a retraction).
    "moe": ServerSpec(
        arch="qwen3_moe",
        flags=(
            *("--disable-overlap-schedule", "--max-total-tokens", "8192", "--enable-custom-logit-processor"),
            *("--tp-size", "2", "--er-group-size", "64"),
        ),
        env=_TEST_PATH,
    ),
    # Two engines behind one port, page size 16, no radix cache, retraction under overlap.
    "dp": ServerSpec(
        arch="mistral",
        flags=("--dp-size", "2", "--page-size", "16", "--max-total-tokens", "8192", "--disable-radix-cache"),
        env={"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "20"},
    ),
    # AReaL's launch and flags: no tokenizer, no radix cache, no chunked prefill; few requests at once. Tests that may
    # end a server run on this one.
    "areal": ServerSpec(
        flags=(
            *("--skip-tokenizer-init", "--disable-radix-cache", "--chunked-prefill-size", "-1"),
            "--sleep-on-idle",  # an idle scheduler that spins takes a core from the tests of large models
            *("--mem-fraction-static", "0.9", "--decode-log-interval", "1", "--enable-metrics"),
            *(
                "--max-running-requests",
                "8",
                "--max-total-tokens",
                "8192",
                "--speculative-algorithm",
                "EFFICIENT_ROLLOUT",
            ),
        ),
        env=_TEST_PATH,
        command=areal_command,
    ),
    # Only in the full matrix: SGLang's GPU attention backends with their kernels pretended. FlashAttention 3 knows one
    # width of verify pass; FlashInfer plans on the host.
    "fa3": ServerSpec(
        flags=("--page-size", "16", "--max-total-tokens", "8192", "--er-executor", "wrapped"),
        env={"SGLANG_ER_TEST_HOOK": "support.gpu_attention:install_fa3", **_TEST_PATH},
    ),
    "fa3 graphs": ServerSpec(
        flags=("--page-size", "16", "--max-total-tokens", "8192", "--er-executor", "wrapped"),
        env={
            "SGLANG_ER_TEST_HOOK": "support.called_graphs:install_fa3",
            "TRITON_INTERPRET": "1",
            **_TEST_PATH,
        },
    ),
    # As on a GPU, but for CUDA itself: our Triton kernels, whole draft passes.
    "triton graphs": ServerSpec(
        flags=(
            *("--max-total-tokens", "4096", "--er-executor", "wrapped"),
            *("--er-kernels", "triton,reference", "--er-draft-graphs", "eager"),
        ),
        env={
            "SGLANG_ER_TEST_HOOK": "support.called_graphs:install_triton",
            "SGLANG_ER_GRAPH_SECONDS": "600",
            "TRITON_INTERPRET": "1",
            **_TEST_PATH,
        },
    ),
    "flashinfer": ServerSpec(
        flags=("--max-total-tokens", "8192", "--chunked-prefill-size", "64", "--er-executor", "wrapped"),
        env={
            "SGLANG_ER_TEST_HOOK": "support.gpu_attention:install_flashinfer",
            "SGLANG_FLASHINFER_USE_PAGED": "true",
            **_TEST_PATH,
        },
    ),
    # Only in the full matrix.
    "qwen2": ServerSpec(arch="qwen2", flags=("--disable-overlap-schedule", "--max-total-tokens", "8192")),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the whole matrix (make test-full)")
    parser.addoption("--ranks", type=int, default=1, help="tensor-parallel ranks of every server that speculates")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        chosen = [item for item in items if item.get_closest_marker("full") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.fixture(scope="session")
def flat_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """flat_model(arch, seed) -> checkpoint directory of a small random fp32 model, made once per session."""
    made: dict[tuple[str, int], Path] = {}

    def get(arch: str = "qwen3", seed: int = 0) -> Path:
        if (arch, seed) not in made:
            from sglang_er.models.make import make_model

            made[arch, seed] = tmp_path_factory.mktemp(f"flat-{arch}-{seed}") / "model"
            make_model("flat", arch, made[arch, seed], dtype="float32", seed=seed)
        return made[arch, seed]

    return get


@pytest.fixture(scope="session")
def server(
    flat_model: Callable[[str, int], Path], tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Callable[[str], Server]]:
    """server(name) -> the shared server of that name (see SERVERS), started at first use."""
    started: dict[str, Server] = {}
    ranks: int = pytestconfig.getoption("--ranks")
    with ExitStack() as stack:

        def get(name: str) -> Server:
            if name not in started:
                spec = SERVERS[name]
                log = tmp_path_factory.mktemp("logs") / f"{name}.log"
                model = flat_model(spec.arch, spec.seed)
                # One thread: these models are too small for two, and several servers share the cores.
                env = {"SGLANG_ER_CPU_THREADS": "1", "SGLANG_ER_CHECK_EPOCHS": "true", **spec.env}
                flags = (*_COMMON, *spec.flags)
                if ranks > 1 and "--plain" not in flags:
                    flags += ("--tp-size", str(ranks))
                    env["SGLANG_ER_GROUP_SIZE"] = "32"  # half of an MLP of 320 inputs has no larger ones
                context = running_server(model, log, *flags, env=env, command=spec.command)
                started[name] = stack.enter_context(context)
            return started[name]

        yield get


class Measured(NamedTuple):
    """The `spec` server while it still had its start-up weights (seed 1)."""

    prompts: list[list[int]]
    gamma: int
    replies: list[dict[str, Any]]
    twin: dict[str, Any]


class UpdatedServer(NamedTuple):
    """`spec` after its update to the seed-0 checkpoint; `before` was measured on seed 1."""

    server: Server
    before: Measured
    twin_after_update: dict[str, Any]
    checkpoints: dict[int, Path]


def update_from_disk(server: Server, checkpoint: Path, **fields: Any) -> dict[str, Any]:
    reply: dict[str, Any] = server.post("/update_weights_from_disk", {"model_path": str(checkpoint), **fields})
    assert reply["success"], reply
    return reply


@pytest.fixture(scope="session")
def updated_spec(server: Callable[[str], Server], flat_model: Callable[[str, int], Path]) -> UpdatedServer:
    """The `spec` server, started on seed 1, measured there and updated from disk to seed 0."""
    spec = server("spec")
    prompts, gamma = mixed_prompts(8, seed=21, longest=60), 5
    spec.fixed(gamma)
    # One at a time: the draft length then depends on nothing but the request.
    replies = spec.generate_all(prompts, greedy(64), concurrency=1)
    before = Measured(prompts, gamma, replies, spec.state()["twin"])
    update_from_disk(spec, flat_model("qwen3", 0))
    checkpoints = {seed: flat_model("qwen3", seed) for seed in (0, 1)}
    return UpdatedServer(spec, before, spec.state()["twin"], checkpoints)


@pytest.fixture
def spec(updated_spec: UpdatedServer) -> Server:
    """Speculation on the same weights as `plain`."""
    return updated_spec.server
