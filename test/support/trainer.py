"""A trainer in its own process: broadcasts a checkpoint to a running server (update_weights_from_distributed, gloo).

python trainer.py SERVER_URL CHECKPOINT_DIR [bare]

Two buckets; `bare` sends neither begin_weight_update nor end_weight_update, as slime and AReaL do.
"""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GROUP = "trainer"


def main(url: str, checkpoint: Path, bare: bool) -> None:
    import requests
    import torch.distributed as dist

    from sglang_er.compat import torchvision_shim

    torchvision_shim.install()
    from safetensors.torch import load_file
    from sglang.srt.utils import init_custom_process_group

    def post(path: str, body: dict[str, Any]) -> None:
        reply = requests.post(url + path, json=body, timeout=120)
        assert reply.status_code == 200, f"{path}: {reply.status_code} {reply.text}"

    def address() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{address()}", world_size=1, rank=0)
    port = address()
    rendezvous = {"master_address": "127.0.0.1", "master_port": str(port), "world_size": 2, "rank_offset": 1}
    weights = load_file(checkpoint / "model.safetensors")
    names = list(weights)
    buckets = [names[: len(names) // 2], names[len(names) // 2 :]]
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(post, "/init_weights_update_group", {**rendezvous, "group_name": GROUP, "backend": "gloo"})
        group = init_custom_process_group(
            backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=GROUP
        )
        joined.result()
        if not bare:
            post("/begin_weight_update", {})
        for bucket in buckets:
            described = {
                "names": bucket,
                "dtypes": [str(weights[name].dtype).removeprefix("torch.") for name in bucket],
                "shapes": [list(weights[name].shape) for name in bucket],
                "group_name": GROUP,
            }
            received = pool.submit(post, "/update_weights_from_distributed", described)
            for name in bucket:
                dist.broadcast(weights[name], src=0, group=group)
            received.result()
        if not bare:
            post("/end_weight_update", {})
        post("/destroy_weights_update_group", {"group_name": GROUP})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), bare=sys.argv[3:] == ["bare"])
