"""The trainer's side of a weight update with SGLang's own code, as slime and AReaL use it (not part of a server)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from sglang_er.compat import torchvision_shim

torchvision_shim.install()

from sglang.srt.utils import MultiprocessingSerializer, init_custom_process_group  # noqa: E402
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket  # noqa: E402


class WeightSender:
    """Implements rollout.conformance.sender.Sender; everything on the CPU, so that it runs without an accelerator."""

    def __init__(self) -> None:
        # Handles by name: the server is no child of this process.
        torch.multiprocessing.set_sharing_strategy("file_system")
        self._shared: list[torch.Tensor] = []

    def bucket(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
        """A flattened bucket, serialized; of no tensors it is what a rank without work sends."""
        if tensors:
            made = FlattenedTensorBucket(named_tensors=list(tensors))
            flat, metadata = made.get_flattened_tensor(), made.get_metadata()
        else:
            flat, metadata = torch.empty(0, dtype=torch.uint8), []
        self._shared = [flat]
        text: str = MultiprocessingSerializer.serialize(
            {"flattened_tensor": flat, "metadata": metadata}, output_str=True
        )
        return text

    def group(self, name: str, port: int) -> Any:
        """Rank 0 of the gloo group `name` of two; the server joins as rank 1."""
        return init_custom_process_group(
            backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=name
        )

    def broadcast(self, group: Any, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """From rank 0, in order."""
        for _, tensor in tensors:
            dist.broadcast(tensor.contiguous(), src=0, group=group)

    def leave(self, group: Any) -> None:
        """Destroy the group on this side."""
        dist.destroy_process_group(group)
