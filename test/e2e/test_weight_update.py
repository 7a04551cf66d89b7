"""Hypothesis: after any weight update the policy is exactly the new one, and the twin is remade before it drafts.

Method: the `spec` server starts on seed 1 and is updated to seed 0 while it lives; its outputs, and the accepts of
every request, must equal those of servers that started on seed 0. Symptom of a stale twin: exact output, hardly any
accepts (shown on purpose in the negative control). Greedy, one request at a time: then the weights decide all accepts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import trainer
from support.buckets import named_tensors
from support.equality import accept_counts, accept_length, assert_pool_empty, assert_same, greedy, ids
from support.prompts import mixed_prompts
from support.server import Server
from support.updates import Reply, assert_is_seed_0, measure, other_weights, post_weights, wait_for_decoding

pytestmark = pytest.mark.server


def test_update_from_disk(
    updated_spec: Any, fresh: list[Reply], plain: Server, server: Callable[[str], Server]
) -> None:
    """Epochs: raised by the update, not by drafting; the twin follows at the next draft and not before."""
    before, after = updated_spec.before.twin, updated_spec.twin_after_update
    assert before["weight_epoch"] == before["twin_epoch"]
    assert after["weight_epoch"] > before["weight_epoch"]
    assert (after["twin_epoch"], after["requantizations"]) == (before["twin_epoch"], before["requantizations"])

    assert_is_seed_0(updated_spec, fresh, "after update_weights_from_disk")
    now = updated_spec.server.state()["twin"]
    assert now["twin_epoch"] == now["weight_epoch"]
    assert now["requantizations"] > after["requantizations"]
    assert now["nbytes"] == before["nbytes"]

    expected = ids(plain.generate_all(updated_spec.before.prompts, greedy(64), concurrency=1))
    assert_same(ids(fresh), expected, "fresh speculating server against fresh plain server")
    assert ids(updated_spec.before.replies) != expected, "both seeds give the same text: nothing was tested"


def test_stale_twin_costs_accepts_not_exactness(updated_spec: Any) -> None:
    """Negative control: without requantization seed 1 is served exactly but drafted for by a twin of seed 0; with it
    the accepts are again those of the server when it had started on seed 1."""
    spec, on_seed_1 = updated_spec.server, updated_spec.before.replies
    measure(spec, updated_spec)  # the twin is that of seed 0
    with other_weights(updated_spec):
        spec.set_policy(requantize=False)
        post_weights(spec, updated_spec.checkpoints[1])
        stale = measure(spec, updated_spec)
        twin = spec.state()["twin"]
        spec.set_policy(requantize=True)
        healed = measure(spec, updated_spec)
    assert twin["twin_epoch"] < twin["weight_epoch"]
    assert_same(ids(stale), ids(on_seed_1), "greedy with a stale twin")
    assert_same(ids(healed), ids(on_seed_1), "greedy with the twin remade")
    assert accept_counts(healed) == accept_counts(on_seed_1)
    fresh_gain, stale_gain = accept_length(on_seed_1) - 1, accept_length(stale) - 1
    assert fresh_gain > 0.3, "the twin is of no use even when fresh: nothing was tested"
    assert stale_gain < 0.2 * fresh_gain, f"accepted drafts per step: stale {stale_gain:.3f}, fresh {fresh_gain:.3f}"


def test_update_from_tensor(updated_spec: Any, fresh: list[Reply]) -> None:
    """Between begin_weight_update and end_weight_update; without that session stock SGLang answers 400, and nothing
    changes."""
    spec = updated_spec.server
    with other_weights(updated_spec):
        post_weights(spec, updated_spec.checkpoints[1])
        measure(spec, updated_spec)
        epoch = spec.state()["twin"]["weight_epoch"]
        weights = load_file(updated_spec.checkpoints[0] / "model.safetensors")

        spec.set_policy(rl_compat="none")
        refused = spec.request("POST", "/update_weights_from_tensor", json=named_tensors(weights))
        assert refused.status_code == 400 and "begin_weight_update" in refused.text
        assert spec.state()["twin"]["weight_epoch"] == epoch
        assert_same(ids(measure(spec, updated_spec)), ids(updated_spec.before.replies), "after the refused update")

        spec.post("/begin_weight_update")
        spec.post("/update_weights_from_tensor", named_tensors(weights))
        loaded = spec.state()["twin"]["weight_epoch"]
        spec.post("/end_weight_update")
        assert epoch < loaded < spec.state()["twin"]["weight_epoch"]
        assert_is_seed_0(updated_spec, fresh, "after update_weights_from_tensor")
    assert_pool_empty(spec)


@pytest.mark.parametrize("session", ["bare", pytest.param("session", marks=pytest.mark.full)])
def test_update_from_distributed(updated_spec: Any, fresh: list[Reply], session: str) -> None:
    """A trainer process broadcasts seed 0 over gloo, in two buckets, to the server on seed 1; as slime and AReaL do it,
    without begin_weight_update, and with it."""
    spec = updated_spec.server
    with other_weights(updated_spec):
        post_weights(spec, updated_spec.checkpoints[1])
        measure(spec, updated_spec)
        epoch = spec.state()["twin"]["weight_epoch"]
        command = [sys.executable, "-m", trainer.__name__, spec.url, str(updated_spec.checkpoints[0])]
        command += ["bare"] if session == "bare" else []
        home = str(Path(trainer.__file__).parents[1])
        sent = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=home)
        assert sent.returncode == 0, sent.stderr[-3000:]
        assert spec.state()["twin"]["weight_epoch"] > epoch
        assert_is_seed_0(updated_spec, fresh, "after update_weights_from_distributed")


def test_failed_updates_mark_the_twin(updated_spec: Any, fresh: list[Reply]) -> None:
    """A failed writer may have written a part: the epoch rises, the server lives and still serves seed 0."""
    spec = updated_spec.server
    for path, body in (
        ("/update_weights_from_disk", {"model_path": "/no/such/checkpoint"}),
        ("/update_weights_from_ipc", {"zmq_handles": {}}),
    ):
        epoch = spec.state()["twin"]["weight_epoch"]
        assert spec.request("POST", path, json=body).status_code == 400
        assert spec.state()["twin"]["weight_epoch"] > epoch, path
    assert_is_seed_0(updated_spec, fresh, "after failed updates")


def test_sleep_and_wake_mark_the_twin(updated_spec: Any, fresh: list[Reply]) -> None:
    """Released memory comes back without its contents on a GPU: the packed buffers must be remade."""
    spec = updated_spec.server
    epoch = spec.state()["twin"]["weight_epoch"]
    assert spec.request("POST", "/release_memory_occupation", json={}).status_code == 200
    assert spec.request("POST", "/resume_memory_occupation", json={}).status_code == 200
    assert spec.state()["twin"]["weight_epoch"] > epoch
    assert_is_seed_0(updated_spec, fresh, "after sleep and wake")


def test_update_in_flight(updated_spec: Any, plain: Server) -> None:
    """Pause with requests running, retract them, update seed 1 -> seed 0, go on: every output begins as seed 1's
    greedy text and goes on as seed 0's greedy continuation of that; no draft of the old twin is committed."""
    spec = updated_spec.server
    prompts, count = mixed_prompts(6, seed=51, longest=60), 400
    with other_weights(updated_spec):
        post_weights(spec, updated_spec.checkpoints[1])
        spec.fixed(0)
        on_seed_1 = ids(spec.generate_all(prompts, greedy(count), concurrency=6))
        spec.fixed(5)
        outputs: list[Reply] = []
        running = threading.Thread(target=lambda: outputs.extend(spec.generate_all(prompts, greedy(count), 6)))
        running.start()
        wait_for_decoding(spec)
        spec.post("/pause_generation", {"mode": "retract"})
        post_weights(spec, updated_spec.checkpoints[0])
        spec.post("/continue_generation")
        running.join()
    switches = []
    for prompt, output, old in zip(prompts, ids(outputs), on_seed_1):
        at = next((i for i, (a, b) in enumerate(zip(output, old)) if a != b), count)
        switches.append(at)
        rest = plain.generate(prompt + output[:at], greedy(count - at))["output_ids"]
        assert_same([output[at:]], [rest], f"continuation after token {at}")
    # On a busy machine a request may come after the update or end before it; most were under way.
    assert len(outputs) == 6 and sum(0 < at < count for at in switches) >= 2, switches
    assert_pool_empty(spec)


def test_served_weights_are_exact(server: Callable[[str], Server], flat_model: Callable[[str, int], Path]) -> None:
    """A linear read back from a speculating server holds the checkpoint's values, not the packed ones (SGLang offers
    this for llama only)."""
    name = "model.layers.1.self_attn.q_proj.weight"
    paged = server("paged")
    paged.fixed(5)
    paged.generate([9, 8, 7], greedy(8))
    read = paged.post("/get_weights_by_name", {"name": name, "truncate_size": 16})
    stored = load_file(flat_model("llama", 0) / "model.safetensors")[name][:16].tolist()
    assert read == json.loads(json.dumps(stored))
