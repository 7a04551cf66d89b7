"""References that several end-to-end tests compare with; each is computed once per session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


@pytest.fixture(scope="session")
def fresh(server: Callable[[str], Server], updated_spec: Any) -> list[dict[str, Any]]:
    """The requests of `updated_spec` on a speculating server that started on seed 0."""
    return measure(server("seeded"), updated_spec)
