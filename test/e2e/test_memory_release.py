"""Hypothesis: a trainer may take the memory and give it back without its contents, and nobody can tell from tokens or
accepted drafts.

Method: real servers on a CPU, where SGLang's saver unmaps nothing; a hook (support/mutants.py) fills with garbage what
a GPU's would have lost: the twin, the KV shadow with every flag set, the KV pool and, unless they are backed up, the
policy's weights. Symptoms of a defect: a twin or a shadow of garbage drafts (hardly any accepts), or something drafts
while memory is away (the counters).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.buckets import flattened, split
from support.equality import accept_counts, accept_length, assert_pool_empty, assert_same, greedy, ids
from support.server import Server
from support.updates import Reply, measure, other_weights, post_weights

pytestmark = pytest.mark.server

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
EVERYTHING = ["cuda_graph", "kv_cache", "weights"]
# Both ways of drafting that have a shadow: read it from the first token on.
DRAFTERS = {
    "native": {"executor": "native", "draft_graphs": "auto"},
    "whole passes": {"executor": "wrapped", "draft_graphs": "eager"},
}


@pytest.fixture(params=DRAFTERS)
def shadowed(request: pytest.FixtureRequest, updated_spec: Any) -> Iterator[Server]:
    spec: Server = updated_spec.server
    with other_weights(updated_spec):
        spec.set_policy(**DRAFTERS[request.param], kv_shadow="int4", kv_shadow_from=0)
        try:
            yield spec
        finally:
            spec.request("POST", RESUME, json={})
            spec.set_policy(**DRAFTERS["native"], kv_shadow="auto", kv_shadow_from=4096, forget=None)


def measured(spec: Server, updated_spec: Any) -> list[Reply]:
    """With a shadow that is there before the first prompt, which its first use makes, and from an empty cache: what is
    read of either depends on nothing before."""
    spec.fixed(updated_spec.before.gamma)
    spec.generate([5, 6, 7], greedy(8))
    spec.flush_cache()
    replies = measure(spec, updated_spec)
    assert spec.state()["kv_shadow"]["valid_slots"] > 0
    return replies


def send(spec: Server, path: str, tags: list[str] | None = None) -> dict[str, Any]:
    """As a trainer calls it; the state afterwards."""
    reply = spec.request("POST", path, json={} if tags is None else {"tags": tags})
    assert reply.status_code == 200, reply.text
    return spec.state()


def assert_as_before(replies: list[Reply], before: list[Reply], what: str) -> None:
    assert_same(ids(replies), ids(before), f"{what}: output")
    assert accept_counts(replies) == accept_counts(before), f"{what}: accepts per request"


def test_sleep_update_wake(updated_spec: Any, shadowed: Server) -> None:
    """A step of a colocated trainer: pause, release all, resume the weights and send new ones, continue, resume the
    rest. The server has seen other weights before."""
    spec = shadowed
    spec.set_policy(forget="all")
    before = measured(spec, updated_spec)
    assert accept_length(before) > 1.3, "drafts are of no use even before: nothing was tested"
    post_weights(spec, updated_spec.checkpoints[1])
    other = measured(spec, updated_spec)
    assert ids(other) != ids(before)

    spec.post("/pause_generation")
    asleep = send(spec, RELEASE)
    assert asleep["memory"]["released"] == EVERYTHING
    assert asleep["twin"]["weight_epoch"] > asleep["twin"]["twin_epoch"]
    assert asleep["kv_shadow"]["valid_slots"] is None
    assert send(spec, RESUME, ["weights"])["memory"]["released"] == ["cuda_graph", "kv_cache"]
    for bucket in split(updated_spec.checkpoints[0], 2):
        spec.post("/update_weights_from_tensor", flattened(bucket, flush_cache=False))
    spec.post("/continue_generation")
    awake = send(spec, RESUME, ["kv_cache", "cuda_graph"])
    assert awake["memory"]["released"] == []
    assert awake["kv_shadow"]["valid_slots"] == 0
    assert awake["twin"]["requantizations"] == asleep["twin"]["requantizations"], "nothing is computed before a draft"
    assert_as_before(measured(spec, updated_spec), before, "after sleep, update and wake")
    assert_pool_empty(spec)


def test_sleep_and_wake_with_a_backup_of_the_weights(updated_spec: Any, shadowed: Server) -> None:
    """No update follows: the policy is what it was, and the twin is remade from it."""
    spec = shadowed
    spec.set_policy(forget="backup")
    before = measured(spec, updated_spec)
    send(spec, RELEASE)
    awake = send(spec, RESUME)
    assert awake["kv_shadow"]["valid_slots"] == 0
    assert awake["twin"]["weight_epoch"] > awake["twin"]["twin_epoch"]
    assert_as_before(measured(spec, updated_spec), before, "after sleep and wake")
    assert spec.state()["twin"]["requantizations"] == awake["twin"]["requantizations"] + 1


@pytest.mark.parametrize("tag", EVERYTHING)
def test_nothing_is_drafted_while_a_part_is_away(updated_spec: Any, shadowed: Server, tag: str) -> None:
    """A request that comes too early is decoded plainly, where plain SGLang can decode it at all."""
    spec = shadowed
    before = measured(spec, updated_spec)
    asleep = send(spec, RELEASE, [tag])
    assert asleep["memory"]["released"] == [tag]
    early = spec.generate_all(updated_spec.before.prompts, greedy(64), concurrency=1)
    after = spec.state()
    assert_same(ids(early), ids(before), f"{tag} away")
    assert after["steps"]["drafted_tokens"] == asleep["steps"]["drafted_tokens"]
    assert after["twin"]["requantizations"] == asleep["twin"]["requantizations"]
    assert f"plain decoding until memory is back ({tag} released)" in spec.log_text()
    awake = send(spec, RESUME, [tag])
    assert tag != "kv_cache" or awake["kv_shadow"]["valid_slots"] == 0
    assert_as_before(measured(spec, updated_spec), before, f"{tag} back")


def test_bytes_under_each_tag(updated_spec: Any, shadowed: Server) -> None:
    spec = shadowed
    measured(spec, updated_spec)
    state = spec.state()
    memory = state["memory"]
    assert not memory["saver"] and memory["released"] == []
    assert memory["nbytes"] == {
        "weights": state["twin"]["nbytes"],
        "kv_cache": state["kv_shadow"]["nbytes"],
        "cuda_graph": 0,  # greedy: nothing is drawn from a distribution
    }
