"""Hypothesis: a twin whose weights lie in Marlin's layout drafts as one in ours does, and is remade as it is.

Method: a real fp32 server that packs for Marlin where the shape allows and multiplies in plain torch, as a CPU has no
Marlin; the same prompts as behind a plain server of the same weights, before and after an update. Symptom of a
defect: other tokens; next to nothing accepted (wrong order of the levels); layers in another layout than named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import update_from_disk
from support.equality import accept_length, assert_pool_empty, assert_same, fixed_gamma, greedy, ids, steps_of
from support.server import Server, running_server

pytestmark = [pytest.mark.server, pytest.mark.full]

GAMMA = 3
Reference = tuple[list[list[int]], list[list[int]]]
FLAGS = ("--dtype", "float32", "--context-length", "512", "--max-total-tokens", "8192", "--random-seed", "1")


@pytest.fixture(scope="module")
def marlin(flat_model: Callable[[str, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On the weights of seed 1; `plain` has those of seed 0."""
    log = tmp_path_factory.mktemp("logs") / "marlin.log"
    env = {"SGLANG_ER_CPU_THREADS": "1", "SGLANG_ER_CHECK_EPOCHS": "true"}
    flags = (*FLAGS, "--er-kernels", "marlin,cpu,reference")
    with running_server(flat_model("qwen3", 1), log, *flags, env=env) as server:
        yield server


def test_greedy_tokens_are_plain_decodes_after_an_update(
    marlin: Server, greedy_reference: Reference, flat_model: Callable[[str, int], Path]
) -> None:
    prompts, expected = (part[:8] for part in greedy_reference)
    before = marlin.state()["twin"]
    assert before["layouts"] == {"marlin": 13, "own": 4}  # an MLP of 320 inputs is no multiple of 128
    assert "keep our own layout" in marlin.log_text() and "packed in the layout marlin" in marlin.log_text()
    marlin.fixed(GAMMA)
    others = ids(marlin.generate_all(prompts, greedy(128), concurrency=4))
    update_from_disk(marlin, flat_model("qwen3", 0))
    with steps_of(marlin) as steps:
        replies = marlin.generate_all(prompts, greedy(128), concurrency=4)
    assert_same(ids(replies), expected, "Marlin's layout")
    assert ids(replies) != others
    steps.assert_speculated(fixed_gamma(GAMMA))
    assert accept_length(replies) > 1.5, accept_length(replies)
    after = marlin.state()["twin"]
    assert after["requantizations"] > before["requantizations"] and after["layouts"] == before["layouts"]
    assert_pool_empty(marlin)
