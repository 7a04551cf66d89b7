"""200 weight updates, from disk and from tensors in turn, under 32 requests: none is lost, memory does not grow, and no
draft pass begins with a twin of another policy (the server would stop: `check_epochs`)."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil
import pytest
from support.buckets import flattened, split
from support.equality import assert_pool_empty, greedy
from support.prompts import mixed_prompts
from support.server import Server
from support.updates import assert_is_seed_0, other_weights, post_weights

pytestmark = [pytest.mark.server, pytest.mark.full]
UPDATES, WARM, REQUESTS, TOKENS = 200, 40, 32, 96


def resident(server: Server) -> int:
    """Bytes of the server's processes that are in memory and their own."""
    family = psutil.Process(server.process.pid)
    return sum(process.memory_full_info().uss for process in (family, *family.children(recursive=True)))


def test_200_updates_under_32_requests(updated_spec: Any, fresh: list[dict[str, Any]]) -> None:
    spec, done = updated_spec.server, threading.Event()
    prompts = mixed_prompts(REQUESTS, seed=81, longest=60)
    lengths: list[int] = []
    spec.fixed(3)
    before = spec.state()["twin"]

    def client(prompt: list[int]) -> None:
        while not done.is_set():
            lengths.append(len(spec.generate(prompt, greedy(TOKENS))["output_ids"]))

    threads = [threading.Thread(target=client, args=(prompt,)) for prompt in prompts]
    memory = 0
    with other_weights(updated_spec):
        for thread in threads:
            thread.start()
        for update in range(UPDATES):
            checkpoint = updated_spec.checkpoints[update % 2]
            spec.post("/pause_generation", {"mode": "retract"})
            if update % 4 < 2:
                post_weights(spec, checkpoint)
            else:
                for bucket in split(checkpoint, 2):
                    spec.post("/update_weights_from_tensor", flattened(bucket))
            spec.post("/continue_generation")
            committed = spec.state()["steps"]["committed_tokens"]
            while spec.state()["steps"]["committed_tokens"] < committed + REQUESTS:
                assert spec.alive(), spec.log_tail()
                time.sleep(0.02)
            if update == WARM:
                memory = resident(spec)
        growth = resident(spec) / memory - 1
        done.set()
        for thread in threads:
            thread.join()
    after = spec.state()["twin"]
    assert len(lengths) >= REQUESTS and set(lengths) == {TOKENS}, "a request was lost or cut"
    assert after["requantizations"] - before["requantizations"] >= UPDATES
    assert growth < 0.01, f"memory grew by {growth:.2%} over {UPDATES - WARM} updates"
    assert_is_seed_0(updated_spec, fresh, "after the soak")
    assert_pool_empty(spec)
