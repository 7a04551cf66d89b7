"""slime's own engine control against a server: python slime_client.py URL OTHER_CHECKPOINT OWN_CHECKPOINT

Health, pause, flush, version, sleep and wake as its trainer calls them, and its loop that aborts until idle. Needs
slime on PYTHONPATH, with ray and sglang_router. Prints one JSON line; an assertion ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from sglang_er.compat import torchvision_shim

torchvision_shim.install()

from slime.backends.sglang_utils.server_control import abort_servers_until_idle  # noqa: E402
from slime.backends.sglang_utils.sglang_engine import SGLangEngine  # noqa: E402

from sglang_er.rollout.conformance import bodies  # noqa: E402


def engine_of(url: str) -> Any:
    """slime's engine without Ray; its `init` builds ServerArgs as a dataclass, which SGLang 0.5.20 ended."""
    engine = SGLangEngine(Namespace(rollout_external=True), rank=0)
    engine.node_rank = 0
    engine.server_host, port = url.removeprefix("http://").split(":")
    engine.server_port = int(port)
    return engine


def main(url: str, other: str, own: str) -> None:
    engine = engine_of(url)
    assert engine.health_generate(timeout=60)
    for version, checkpoint in (("7", other), ("8", own)):
        engine.pause_generation()
        engine.flush_cache()
        body = {"model_path": checkpoint, "weight_version": version}
        assert requests.post(f"{url}/update_weights_from_disk", json=body, timeout=120).json()["success"]
        engine.continue_generation()
        assert engine.get_weight_version() == version
    engine.release_memory_occupation()
    engine.resume_memory_occupation(tags=["weights"])
    engine.resume_memory_occupation(tags=["kv_cache", "cuda_graph"])
    with ThreadPoolExecutor(4) as pool:
        wanted = [bodies.slime([60 + i, 61, 62], 400, ignore_eos=True) for i in range(4)]
        futures = [pool.submit(requests.post, f"{url}/generate", json=body, timeout=120) for body in wanted]
        while not requests.get(f"{url}/v1/loads?include=core", timeout=60).json()["loads"][0]["num_running_reqs"]:
            pass
        asyncio.run(abort_servers_until_idle([url]))
        finished = [future.result().json()["meta_info"]["finish_reason"]["type"] for future in futures]
    assert set(finished) <= {"abort", "length"}, finished
    print(json.dumps({"finished": finished}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:4])
