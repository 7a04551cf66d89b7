"""What the weight update tests share: the `spec` server on another checkpoint, and what must be true of it then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.equality import accept_counts, assert_same, greedy, ids
from support.server import Server

Reply = dict[str, Any]


def post_weights(server: Server, checkpoint: Path, **fields: Any) -> Reply:
    reply: Reply = server.post("/update_weights_from_disk", {"model_path": str(checkpoint), **fields})
    return reply


def measure(server: Server, updated: Any) -> list[Reply]:
    """The request set that was also measured on the start-up weights, each request on its own."""
    server.fixed(updated.before.gamma)
    return server.generate_all(updated.before.prompts, greedy(64), concurrency=1)


@contextmanager
def other_weights(updated: Any) -> Iterator[None]:
    """Whatever happens inside, `spec` is on seed 0 with requantization on afterwards, as other tests expect it."""
    try:
        yield
    finally:
        updated.server.post("/continue_generation")
        updated.server.set_policy(
            requantize=True, rl_compat="all", requantize_on_continue=True, weight_check_seconds=10
        )
        post_weights(updated.server, updated.checkpoints[0])


def assert_is_seed_0(updated: Any, fresh: list[Reply], what: str) -> None:
    """Output and accepts of every request are those of a server that started on seed 0, and the epochs are equal."""
    replies = measure(updated.server, updated)
    assert_same(ids(replies), ids(fresh), f"{what}: output")
    assert accept_counts(replies) == accept_counts(fresh), f"{what}: accepts per request"
    twin = updated.server.state()["twin"]
    assert twin["twin_epoch"] == twin["weight_epoch"], what


def wait_for_decoding(server: Server) -> None:
    """Until some tokens of the running requests are committed."""
    start, deadline = server.state()["steps"]["committed_tokens"], time.monotonic() + 30
    while server.state()["steps"]["committed_tokens"] < start + 120:
        assert time.monotonic() < deadline
        time.sleep(0.02)
