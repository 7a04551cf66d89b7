"""References that several end-to-end tests compare with; each is computed once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.equality import greedy, ids, lively
from support.prompts import mixed_prompts
from support.server import Server
from support.updates import measure

OUTPUT_TOKENS = 128
# Below this distance between the two best logprobs, rounding (about 1e-6, it depends on the batch) may decide.
LEAST_MARGIN = 2e-5
GreedyReference = tuple[list[list[int]], list[list[int]]]


@pytest.fixture(scope="session")
def plain(server: Callable[[str], Server]) -> Server:
    """Plain decode of the seed-0 weights."""
    return server("plain")


@pytest.fixture(scope="session")
def greedy_reference(plain: Server) -> GreedyReference:
    """32 prompts of 3..200 tokens and plain decode's 128 greedy tokens for each: none degenerate, none a coin toss."""
    prompts = mixed_prompts(44, seed=7)
    replies = plain.generate_all(
        prompts, greedy(OUTPUT_TOKENS), concurrency=16, return_logprob=True, top_logprobs_num=2
    )
    clear = [(prompt, reply) for prompt, reply in zip(prompts, replies) if margin(reply) >= LEAST_MARGIN]
    reference = lively([prompt for prompt, _ in clear], ids([reply for _, reply in clear]), count=32)
    assert all(len(output) == OUTPUT_TOKENS for output in reference[1])
    return reference


def margin(reply: dict[str, Any]) -> float:
    """Smallest distance between the best and the second best logprob of any output token."""
    return min(best[0] - second[0] for best, second in reply["meta_info"]["output_top_logprobs"])


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


@pytest.fixture(scope="session")
def fresh(server: Callable[[str], Server], updated_spec: UpdatedServer) -> list[dict[str, Any]]:
    """The requests of `updated_spec` on a speculating server that started on seed 0."""
    return measure(server("seeded"), updated_spec)


@pytest.fixture
def spec(updated_spec: UpdatedServer) -> Server:
    """Speculation on the same weights as `plain`."""
    return updated_spec.server
