"""AReaL's own client against a server: python areal_client.py URL OTHER_CHECKPOINT OWN_CHECKPOINT

Its interruptible generation across an update from disk, the requests of its backend in its order, sleep and wake. Needs
AReaL on PYTHONPATH. Prints one JSON line; an assertion ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from sglang_er.compat import torchvision_shim

torchvision_shim.install()

from areal.api import ModelRequest, WeightUpdateMeta  # noqa: E402
from areal.api.cli_args import GenerationHyperparameters, InferenceEngineConfig  # noqa: E402
from areal.engine.sglang_remote import RemoteSGLangEngine, SGLangBackend  # noqa: E402

BUDGET, REQUESTS = 300, 4


def update(url: str, checkpoint: str) -> None:
    meta = WeightUpdateMeta(type="disk", path=checkpoint, clear_checkpoint_after_load=False)
    for request in SGLangBackend().build_disk_weight_update_requests(meta).requests:
        reply = requests.post(url + request.endpoint, json=request.payload, timeout=120)
        assert reply.status_code == 200 and reply.json()["success"], reply.text


async def interrupted(engine: Any, url: str, other: str) -> list[Any]:
    """Responses in flight across pause, update and continue."""
    params = GenerationHyperparameters(max_new_tokens=BUDGET, max_tokens=480, ignore_eos=True)
    wanted = [ModelRequest(input_ids=[40 + i, 50, 60, 70], gconfig=params) for i in range(REQUESTS)]
    tasks = [asyncio.create_task(engine.agenerate(request)) for request in wanted]
    await asyncio.sleep(0.3)
    # The engine's own calls run an event loop of their own.
    with ThreadPoolExecutor(1) as pool:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(pool, engine.pause_generation)
        await loop.run_in_executor(pool, update, url, other)
        engine.set_version(1)
        await loop.run_in_executor(pool, engine.continue_generation)
    return list(await asyncio.gather(*tasks))


def main(url: str, other: str, own: str) -> None:
    config = InferenceEngineConfig(backend="sglang:d1", max_concurrent_rollouts=REQUESTS, request_timeout=120)
    engine = RemoteSGLangEngine(config)
    engine.initialize(addr=[url.removeprefix("http://")], train_data_parallel_size=1)
    engine.set_version(0)
    replies = asyncio.run(interrupted(engine, url, other))
    counts = []
    for reply in replies:
        assert len(reply.output_tokens) == len(reply.output_logprobs) == len(reply.output_versions) == BUDGET
        assert reply.output_versions == sorted(reply.output_versions) and reply.stop_reason == "length"
        counts.append(reply.output_versions.count(0))
    engine.pause_generation()
    engine.offload()
    engine.onload(["weights"])
    update(url, own)
    engine.continue_generation()
    engine.onload(["kv_cache", "cuda_graph"])
    params = GenerationHyperparameters(max_new_tokens=16, max_tokens=480, ignore_eos=True, greedy=True)
    last = asyncio.run(engine.agenerate(ModelRequest(input_ids=[1, 2, 3], gconfig=params)))
    assert len(last.output_tokens) == 16
    print(json.dumps({"tokens of version 0": counts}), flush=True)
    # Its threads and process pool would keep the interpreter alive.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:4])
