"""Every way in which trainers bring new weights, and what must follow: the policy is the new one at once, the twin is
remade before it drafts. `spec` goes from seed 1 to seed 0; output and accepts must be those of a server that started
on seed 0 (test_weight_update.py shows that a stale twin fails this).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from safetensors.torch import load_file
from support.buckets import flattened, named_tensors, split
from support.equality import accept_length, assert_pool_empty, assert_same, greedy, ids
from support.prompts import mixed_prompts
from support.server import Server
from support.updates import Reply, assert_is_seed_0, measure, other_weights, post_weights, wait_for_decoding

pytestmark = pytest.mark.server


@pytest.fixture
def on_seed_1(updated_spec: Any) -> Iterator[Server]:
    """`spec` with the weights of seed 1 and a twin of them; on seed 0 afterwards."""
    with other_weights(updated_spec):
        post_weights(updated_spec.server, updated_spec.checkpoints[1])
        measure(updated_spec.server, updated_spec)
        yield updated_spec.server


def test_buckets_of_a_colocated_trainer(updated_spec: Any, fresh: list[Reply], on_seed_1: Server) -> None:
    """slime: pause, flush, flattened buckets (an empty one among them) without begin_weight_update, continue."""
    spec = on_seed_1
    buckets = split(updated_spec.checkpoints[0], 5)
    spec.post("/pause_generation")
    spec.flush_cache()
    for bucket in (*buckets[:2], {}, *buckets[2:]):
        spec.post("/update_weights_from_tensor", flattened(bucket, flush_cache=False, weight_version="7"))
    spec.post("/continue_generation")
    assert_is_seed_0(updated_spec, fresh, "after buckets without a session")
    assert spec.get("/get_weight_version") == {"weight_version": "7"}
    assert spec.generate([5, 6, 7], greedy(4))["meta_info"]["weight_version"] == "7"
    for part in ("sessions", "weight_version", "spec_keys"):
        assert spec.log_text().count(f"part {part}; said once") == 1, part
    spec.set_policy(rl_compat="guard")
    assert spec.request("GET", "/get_weight_version").status_code == 404


@pytest.mark.parametrize("selector", ["target", "all"])
def test_session_with_a_selector(updated_spec: Any, fresh: list[Reply], on_seed_1: Server, selector: str) -> None:
    """A real session wins: it stays open from bucket to bucket, and nothing is drafted while it is."""
    spec = on_seed_1
    spec.post("/begin_weight_update", {"selector": selector})
    for bucket in split(updated_spec.checkpoints[0], 3):
        spec.post("/update_weights_from_tensor", flattened(bucket, selector=selector))
        assert spec.state()["twin"]["session_open"]
        before = spec.state()
        spec.generate([5, 6, 7], greedy(12))
        after = spec.state()
        assert after["twin"]["requantizations"] == before["twin"]["requantizations"]
        assert after["steps"]["drafted_tokens"] == before["steps"]["drafted_tokens"]
    spec.post("/end_weight_update")
    assert not spec.state()["twin"]["session_open"]
    assert_is_seed_0(updated_spec, fresh, f"after a session with selector {selector}")


def test_selector_draft_is_nobody(updated_spec: Any, on_seed_1: Server) -> None:
    """The twin has no weights of its own to send: such an update succeeds and changes nothing."""
    spec = on_seed_1
    epoch = spec.state()["twin"]["weight_epoch"]
    weights = load_file(updated_spec.checkpoints[0] / "model.safetensors")
    spec.post("/begin_weight_update", {"selector": "draft"})
    spec.post("/update_weights_from_tensor", named_tensors(weights, selector="draft"))
    spec.post("/end_weight_update")
    assert spec.state()["twin"]["weight_epoch"] == epoch
    assert_same(ids(measure(spec, updated_spec)), ids(updated_spec.before.replies), "after selector draft")


def test_half_an_update(updated_spec: Any, fresh: list[Reply], on_seed_1: Server) -> None:
    """Half of the tensors: a policy that no checkpoint has, served exactly and drafted for by its own twin."""
    spec = on_seed_1
    first, second = split(updated_spec.checkpoints[0], 2)
    spec.post("/update_weights_from_tensor", named_tensors(first))
    half = measure(spec, updated_spec)
    twin = spec.state()["twin"]
    assert twin["twin_epoch"] == twin["weight_epoch"]
    spec.fixed(0)
    plain = spec.generate_all(updated_spec.before.prompts, greedy(64), concurrency=1)
    assert_same(ids(half), ids(plain), "half-updated policy: drafted against plain decode")
    assert ids(half) != ids(updated_spec.before.replies)
    spec.post("/update_weights_from_tensor", named_tensors(second))
    assert_is_seed_0(updated_spec, fresh, "after the other half")


@pytest.mark.parametrize("mode", ["abort", "in_place"])
def test_pause_modes(updated_spec: Any, fresh: list[Reply], on_seed_1: Server, mode: str) -> None:
    """Requests run when generation is paused. abort returns what they have; in_place goes on with the old KV and the
    new weights. Either way no token is lost and the twin is the new one's (retract: test_weight_update.py)."""
    spec, prompts, count = on_seed_1, mixed_prompts(4, seed=61, longest=40), 400
    spec.fixed(5)
    outputs: list[Reply] = []
    running = threading.Thread(target=lambda: outputs.extend(spec.generate_all(prompts, greedy(count), 4)))
    running.start()
    wait_for_decoding(spec)
    spec.post("/pause_generation", {"mode": mode})
    fields = {} if mode == "abort" else {"flush_cache": False}
    post_weights(spec, updated_spec.checkpoints[0], weight_version=f"in flight, {mode}", **fields)
    spec.post("/continue_generation")
    running.join()
    kinds = [reply["meta_info"]["finish_reason"]["type"] for reply in outputs]
    lengths = [len(reply["output_ids"]) for reply in outputs]
    if mode == "abort":
        assert "abort" in kinds and all(kind in ("abort", "length") for kind in kinds), kinds
    else:
        assert kinds == ["length"] * 4 and lengths == [count] * 4
        versions = [[span["version"] for span in reply["meta_info"]["weight_versions"]] for reply in outputs]
        assert any(len(spans) == 2 and spans[1] == f"in flight, {mode}" for spans in versions), versions
    spec.flush_cache()
    assert_is_seed_0(updated_spec, fresh, f"after an update in pause mode {mode}")
    assert_pool_empty(spec)


def test_sleep_in_slimes_order(updated_spec: Any, fresh: list[Reply], on_seed_1: Server) -> None:
    """flush, release, resume the weights, update, continue while KV and graphs are still away, resume those. Twice
    what was done already changes nothing."""
    spec = on_seed_1
    spec.flush_cache()
    for _ in range(2):
        assert spec.request("POST", "/release_memory_occupation", json={}).status_code == 200
    assert spec.state()["twin"]["weights_released"]
    refused = spec.request("POST", "/er/requantize")
    assert refused.status_code == 409 and "released" in refused.text
    for _ in range(2):
        assert spec.request("POST", "/resume_memory_occupation", json={"tags": ["weights"]}).status_code == 200
    spec.post("/pause_generation")
    for bucket in split(updated_spec.checkpoints[0], 2):
        spec.post("/update_weights_from_tensor", flattened(bucket, flush_cache=False))
    made = spec.state()["twin"]["requantizations"]
    spec.post("/continue_generation")
    assert spec.state()["twin"]["requantizations"] == made, "nothing may be computed before KV and graphs are back"
    rest = {"tags": ["kv_cache", "cuda_graph"]}
    assert spec.request("POST", "/resume_memory_occupation", json=rest).status_code == 200
    assert_is_seed_0(updated_spec, fresh, "after slime's sleep and wake")


@pytest.mark.parametrize("noticed_by", ["continue", "requantize", "row check"])
def test_weights_written_behind_our_back(
    updated_spec: Any, fresh: list[Reply], on_seed_1: Server, noticed_by: str
) -> None:
    """A trainer in the engine's process copies into the parameters: no call tells of it. Without any of the three
    remedies the drafts are useless; with one of them the twin follows."""
    spec = on_seed_1
    spec.set_policy(weight_check_seconds=0, requantize_on_continue=noticed_by == "continue")
    before = spec.state()["twin"]
    spec.set_policy(write_weights=str(updated_spec.checkpoints[0]))
    spec.flush_cache()
    stale = measure(spec, updated_spec)
    assert_same(ids(stale), ids(fresh), "exact with a stale twin")
    assert accept_length(stale) - 1 < 0.2 * (accept_length(fresh) - 1), "the write was noticed without a remedy"
    assert spec.state()["twin"]["weight_epoch"] == before["weight_epoch"]

    if noticed_by == "requantize":
        engine = spec.post("/er/requantize")["engines"][0]
        assert engine["seconds"] > 0 and engine["weight_epoch"] > before["weight_epoch"]
    elif noticed_by == "continue":
        spec.post("/pause_generation")
        spec.post("/continue_generation")
    else:
        spec.set_policy(weight_check_seconds=0.001)
    time.sleep(0.01)
    assert_is_seed_0(updated_spec, fresh, f"noticed by {noticed_by}")
    twin = spec.state()["twin"]
    assert twin["requantizations"] == before["requantizations"] + 1
    assert twin["undeclared_writes"] - before["undeclared_writes"] == (noticed_by == "row check")
    assert ("without an update call" in spec.log_text()) or noticed_by != "row check"


def test_epochs_are_shown(updated_spec: Any, spec: Server) -> None:
    """The same figures in /server_info, GET /er/state and /metrics; old metric keys beside the new ones."""
    meta = measure(spec, updated_spec)[0]["meta_info"]
    assert meta["spec_accept_token_num"] == meta["spec_num_correct_drafts"] > 0
    assert meta["spec_draft_token_num"] == meta["spec_num_proposed_drafts"] > 0
    spec.set_policy(rl_compat="guard")
    stock = spec.generate([5, 6, 7], greedy(8))["meta_info"]
    spec.set_policy(rl_compat="all")
    assert "spec_num_correct_drafts" in stock
    assert not {"spec_accept_token_num", "spec_draft_token_num"} & set(stock)
    twin = spec.state()["twin"]
    assert spec.get("/server_info")["internal_states"][0]["sglang_er"]["twin"] == twin
    lines = [line for line in spec.request("GET", "/metrics").text.splitlines() if line.startswith("sglang_er:")]
    shown = {line.split("{")[0].removeprefix("sglang_er:"): float(line.split()[-1]) for line in lines}
    assert shown["weight_epoch"] == shown["twin_epoch"] == twin["weight_epoch"]
    assert shown["requantizations_total"] == twin["requantizations"] > 0
    assert shown["requantize_seconds_total"] == pytest.approx(twin["requantize_seconds"], abs=1e-5)
    assert shown["undeclared_weight_writes_total"] == twin["undeclared_writes"]
