"""Weight and memory requests that are wrong: an HTTP error or a defined order, a living server, an exact policy.

Stock SGLang 0.5.21 ends its scheduler process on most of the updates here. The `spec` server is on seed 0 before and
after; what a bad update wrote of the weights is overwritten by a good one.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.buckets import flattened, named_tensors, pickled, split
from support.equality import assert_same, greedy, ids
from support.prompts import mixed_prompts
from support.server import Server
from support.updates import Reply, assert_is_seed_0, measure, other_weights, post_weights, wait_for_decoding

pytestmark = pytest.mark.server
DISK, TENSOR = "/update_weights_from_disk", "/update_weights_from_tensor"
DISTRIBUTED = "/update_weights_from_distributed"
NAME = "model.layers.0.mlp.down_proj.weight"
# Of a norm SGLang wants the very shape; a narrower linear weight it pads without a word.
NORM = "model.layers.0.input_layernorm.weight"


def bad_metadata(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    content = {"flattened_tensor": weights[NAME].flatten().view(torch.uint8), "metadata": [{"name": NAME}]}
    return {"serialized_named_tensors": [pickled(content)], "load_format": "flattened_bucket"}


# what is wrong -> (path, body from the seed-0 weights)
REFUSED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], dict[str, Any]]]] = {
    "not a pickle": (TENSOR, lambda _: {"serialized_named_tensors": ["bm90IGEgcGlja2xl"]}),
    "no payload": (TENSOR, lambda _: {"serialized_named_tensors": []}),
    "bad bucket": (TENSOR, bad_metadata),
    "truncated bucket": (TENSOR, lambda w: {**flattened({NAME: w[NAME]}), "load_format": None}),
    "wrong shape": (TENSOR, lambda w: named_tensors({NORM: w[NORM][:-1].contiguous()})),
    "unknown tensor, direct": (TENSOR, lambda w: named_tensors({"no.such": w[NAME]}, load_format="direct")),
    "unknown format": (TENSOR, lambda w: named_tensors({NAME: w[NAME]}, load_format="none.of.these")),
    "unknown group": (DISTRIBUTED, lambda _: {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]}),
    "group without a name": (
        "/init_weights_update_group",
        lambda _: {
            "master_address": "127.0.0.1",
            "master_port": 1,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": "",
        },
    ),
    "end without begin": ("/end_weight_update", lambda _: {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_updates_are_refused(updated_spec: Any, what: str) -> None:
    spec = updated_spec.server
    path, body = REFUSED[what]
    weights = load_file(updated_spec.checkpoints[0] / "model.safetensors")
    with other_weights(updated_spec):
        reply = spec.request("POST", path, json=body(weights))
        assert reply.status_code == 400, f"{what}: {reply.status_code} {reply.text[:300]}"
        assert spec.alive()
        assert not spec.state()["twin"]["session_open"]
        spec.generate([5, 6, 7], greedy(8))


def test_bad_selector_is_refused(spec: Server) -> None:
    assert 400 <= spec.request("POST", "/begin_weight_update", json={"selector": "bogus"}).status_code < 500
    assert spec.alive()


def test_what_sglang_takes_is_taken(updated_spec: Any, fresh: list[Reply]) -> None:
    """An unknown name is skipped and another dtype is cast, as stock SGLang does; the policy stays that of seed 0."""
    spec = updated_spec.server
    weights = load_file(updated_spec.checkpoints[0] / "model.safetensors")
    spec.post(TENSOR, named_tensors({"model.layers.0.mlp.no_such_proj.weight": weights[NAME]}))
    spec.post(TENSOR, named_tensors({NAME: weights[NAME].double()}))
    assert_is_seed_0(updated_spec, fresh, "after an unknown name and another dtype")


def test_a_broken_checkpoint(updated_spec: Any, fresh: list[Reply], tmp_path: Path) -> None:
    """SGLang's own way back reads the broken checkpoint again and ends the server; here it is a 400."""
    spec = updated_spec.server
    broken = tmp_path / "broken"
    shutil.copytree(updated_spec.checkpoints[1], broken)
    weights = load_file(broken / "model.safetensors")
    weights[NORM] = weights[NORM][:-1].contiguous()
    save_file(weights, broken / "model.safetensors")
    with other_weights(updated_spec):
        reply = spec.request("POST", DISK, json={"model_path": str(broken)})
        assert reply.status_code == 400 and "send the whole update again" in reply.text
        drafted = measure(spec, updated_spec)
        spec.fixed(0)
        plain = spec.generate_all(updated_spec.before.prompts, greedy(64), concurrency=1)
        assert_same(ids(drafted), ids(plain), "the half-loaded policy: drafted against plain decode")
    assert_is_seed_0(updated_spec, fresh, "after a broken checkpoint")


def test_nan_weights(updated_spec: Any, fresh: list[Reply]) -> None:
    """Served as SGLang serves them; the twin is made of them without a crash, and of good ones afterwards."""
    spec = updated_spec.server
    weights = load_file(updated_spec.checkpoints[0] / "model.safetensors")
    with other_weights(updated_spec):
        spec.post(TENSOR, named_tensors({NAME: torch.full_like(weights[NAME], float("nan"))}))
        spec.fixed(5)
        assert len(spec.generate([5, 6, 7], greedy(8))["output_ids"]) == 8
        assert spec.alive()
    assert_is_seed_0(updated_spec, fresh, "after NaN weights")


def test_memory_requests(spec: Server) -> None:
    """Release while a request runs, tags that do not exist, resume of what is resident."""
    release, resume = "/release_memory_occupation", "/resume_memory_occupation"
    outputs: list[Reply] = []
    running = threading.Thread(target=lambda: outputs.append(spec.generate([5, 6, 7], greedy(400))))
    running.start()
    wait_for_decoding(spec)
    reply = spec.request("POST", release, json={})
    assert reply.status_code == 400 and "running" in reply.text
    running.join()
    assert len(outputs[0]["output_ids"]) == 400

    for path in (release, resume):
        reply = spec.request("POST", path, json={"tags": ["wieghts"]})
        assert reply.status_code == 400 and "wieghts" in reply.text
    assert spec.request("POST", resume, json={}).status_code == 200
    spec.set_policy(rl_compat="guard")
    reply = spec.request("POST", resume, json={"tags": ["weights"]})
    assert reply.status_code == 400 and "not released" in reply.text
    spec.set_policy(rl_compat="all")
    assert not spec.state()["twin"]["weights_released"]
    assert len(spec.generate([5, 6, 7], greedy(8))["output_ids"]) == 8


def test_flush_while_requests_are_kept(updated_spec: Any) -> None:
    """Paused in_place, an update that must flush the cache cannot: it is refused before it writes anything."""
    spec = updated_spec.server
    spec.fixed(5)
    prompts = mixed_prompts(2, seed=71, longest=20)
    outputs: list[Reply] = []
    running = threading.Thread(target=lambda: outputs.extend(spec.generate_all(prompts, greedy(400), 2)))
    with other_weights(updated_spec):
        running.start()
        wait_for_decoding(spec)
        spec.post("/pause_generation", {"mode": "in_place"})
        epoch = spec.state()["twin"]["weight_epoch"]
        reply = spec.request("POST", DISK, json={"model_path": str(updated_spec.checkpoints[1])})
        assert reply.status_code == 400 and "flush_cache" in reply.text
        assert spec.state()["twin"]["weight_epoch"] == epoch
        spec.post("/continue_generation")
        running.join()
    spec.fixed(0)
    again = [spec.generate(prompt, greedy(400)) for prompt in prompts]
    assert_same(ids(outputs), ids(again), "requests that were paused around a refused update")


def test_two_trainers(updated_spec: Any, fresh: list[Reply]) -> None:
    """The second session is refused. Updates, requantizations and requests at once are done one after another: the
    server ends on the checkpoint that was sent last, with its own twin."""
    spec = updated_spec.server
    with other_weights(updated_spec):
        spec.post("/begin_weight_update")
        second = spec.request("POST", "/begin_weight_update", json={})
        assert second.status_code == 400 and "already open" in second.text
        spec.post("/end_weight_update")

        spec.fixed(5)
        failed: list[str] = []

        def repeat(action: Callable[[], Any]) -> None:
            for _ in range(6):
                reply = action()
                if reply.status_code != 200:
                    failed.append(reply.text[:300])

        def from_disk() -> Any:
            return spec.request(
                "POST", "/update_weights_from_disk", json={"model_path": str(updated_spec.checkpoints[1])}
            )

        def from_tensor() -> Any:
            bucket = split(updated_spec.checkpoints[0], 1)[0]
            return spec.request("POST", TENSOR, json=flattened(bucket))

        def requantize() -> Any:
            return spec.request("POST", "/er/requantize")

        def generate() -> Any:
            body = {"input_ids": [5, 6, 7], "sampling_params": greedy(40)}
            return spec.request("POST", "/generate", json=body)

        threads = [
            threading.Thread(target=repeat, args=(act,)) for act in (from_disk, from_tensor, requantize, generate)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        post_weights(spec, updated_spec.checkpoints[0])
        assert_is_seed_0(updated_spec, fresh, "after two trainers at once")
