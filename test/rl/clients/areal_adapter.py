"""AReaL's own classes with our backend: python areal_adapter.py CHECKPOINT OTHER_CHECKPOINT EXAMPLE_YAML FOLDER

What was recorded of AReaL still holds; the example loads; AReaL's engine starts a server through our backend,
generates, updates its weights and takes it down. Needs AReaL and test/ on PYTHONPATH. Prints one JSON line; an
assertion ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import requests

from sglang_er.compat import torchvision_shim

torchvision_shim.install()
# The trainer imports these sinks of metrics, which a run of this file has no use for.
for sink in ("swanlab", "trackio"):
    sys.modules.setdefault(sink, ModuleType(sink))

from areal.api import ModelRequest, WeightUpdateMeta  # noqa: E402
from areal.api.cli_args import GenerationHyperparameters, SGLangConfig, load_expr_config  # noqa: E402
from areal.trainer import rl_trainer  # noqa: E402
from support import areal_contract  # noqa: E402

from sglang_er.integrations.areal import ERGRPOConfig, ERRemoteSGLangEngine, use_in_trainer  # noqa: E402
from sglang_er.integrations.areal.backend import serve_command  # noqa: E402

TOKENS = 120


def check_contract() -> None:
    recorded = areal_contract.RECORDED
    assert asdict(SGLangConfig()) == recorded["fields"], "fields or defaults of SGLangConfig changed"
    config = SGLangConfig(model_path=areal_contract.MODEL)
    args = SGLangConfig.build_args(config, 1, 0)
    assert args == areal_contract.build_args(config, 1, 0), "build_args changed"
    args |= {"some": [1, 2], "none": [], "on": True, "empty": ""}
    assert SGLangConfig.build_cmd_from_args(args) == areal_contract.command(args), "build_cmd_from_args changed"


def check_example(example: str, folder: str) -> Any:
    places = [f"cluster.fileroot={folder}", f"cluster.name_resolve.nfs_record_root={folder}/names"]
    config, _ = load_expr_config(["--config", example, *places], ERGRPOConfig)
    assert config.sglang.er == {"policy": "goodput", "gamma_max": 7}, config.sglang.er
    assert config.sglang.model_path == config.actor.path
    use_in_trainer()
    assert rl_trainer.RemoteSGLangEngine is ERRemoteSGLangEngine
    # The call of AReaL's trainer.
    args = rl_trainer.SGLangConfig.build_args(sglang_config=config.sglang, tp_size=1, pp_size=1, base_gpu_id=0)
    assert "--er-policy" in serve_command(args)
    plain, _ = load_expr_config(["--config", example, *places, "+sglang.er_plain=true"], ERGRPOConfig)
    assert "--plain" in serve_command(SGLangConfig.build_args(plain.sglang, 1, 0))
    runpy.run_path(str(Path(example).with_name("train.py")))  # not as a program: what it imports is there
    return config


def main(own: str, other: str, example: str, folder: str) -> None:
    check_contract()
    config = check_example(example, folder)
    config.rollout.backend, config.rollout.setup_timeout = "sglang:d1p1t1", 300
    served = config.sglang
    served.model_path, served.dtype, served.context_length = own, "float32", 512
    served.attention_backend = None  # the example's is for GPUs
    served.er |= {"policy": "fixed", "gamma": 3, "cpu_threads": 1, "check_epochs": True}
    served.er_flags = {"max_total_tokens": 8192}
    engine = ERRemoteSGLangEngine(config.rollout)
    server = engine.launch_server(SGLangConfig.build_args(served, tp_size=1, base_gpu_id=0))
    try:
        print(json.dumps(use(engine, f"http://{server.host}:{server.port}", other)), flush=True)
    finally:
        engine.teardown_server()
    assert server.process.wait(30) is not None
    # Its threads and process pool would keep the interpreter alive.
    os._exit(0)


def use(engine: Any, url: str, other: str) -> dict[str, Any]:
    engine.initialize(train_data_parallel_size=1)
    params = GenerationHyperparameters(max_new_tokens=TOKENS, max_tokens=480, ignore_eos=True)

    def answers() -> None:
        wanted = [ModelRequest(input_ids=[40 + i, 50, 60, 70], gconfig=params) for i in range(4)]

        async def all_of_them() -> list[Any]:
            return list(await asyncio.gather(*[engine.agenerate(request) for request in wanted]))

        for reply in asyncio.run(all_of_them()):
            assert len(reply.output_tokens) == len(reply.output_logprobs) == TOKENS
            assert all(logprob <= 0 for logprob in reply.output_logprobs)

    answers()
    meta = WeightUpdateMeta(type="disk", path=other, clear_checkpoint_after_load=False)
    engine.pause_generation()
    for request in engine._engine.backend.build_disk_weight_update_requests(meta).requests:
        reply = requests.post(url + request.endpoint, json=request.payload, timeout=120)
        assert reply.status_code == 200 and reply.json()["success"], reply.text
    engine.continue_generation()
    answers()
    info = requests.get(f"{url}/server_info", timeout=30).json()
    assert info["speculative_algorithm"] == "EFFICIENT_ROLLOUT" and info["skip_tokenizer_init"]
    state = requests.get(f"{url}/er/state", timeout=30).json()["engines"][0]
    assert state["twin"]["twin_epoch"] == state["twin"]["weight_epoch"] > 0
    accept_length = state["steps"]["accept_length"]
    assert accept_length > 1
    return {"tokens": state["steps"]["committed_tokens"], "accept length": round(accept_length, 2)}


if __name__ == "__main__":
    main(*sys.argv[1:5])
