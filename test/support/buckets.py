"""Weights as trainers put them into POST /update_weights_from_tensor: pickled handles of shared memory."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from safetensors.torch import load_file


def pickled(value: Any) -> str:
    # Handles by name: the server is no child of this process.
    torch.multiprocessing.set_sharing_strategy("file_system")
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(value)
    return base64.b64encode(buffer.getvalue()).decode()


def named_tensors(tensors: Mapping[str, torch.Tensor], **fields: Any) -> dict[str, Any]:
    """The request body with one (name, tensor) list."""
    return {"serialized_named_tensors": [pickled(list(tensors.items()))], **fields}


def flattened(tensors: Mapping[str, torch.Tensor], **fields: Any) -> dict[str, Any]:
    """The request body with one flat buffer and its table of contents; `tensors` may be empty, as slime sends it."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    content: dict[str, Any] = {"flattened_tensor": torch.empty(0, dtype=torch.uint8), "metadata": []}
    if tensors:
        bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
        content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    return {"serialized_named_tensors": [pickled(content)], "load_format": "flattened_bucket", **fields}


def split(checkpoint: Path, parts: int) -> list[dict[str, torch.Tensor]]:
    """The checkpoint's tensors in `parts` buckets."""
    weights = list(load_file(checkpoint / "model.safetensors").items())
    return [dict(weights[i::parts]) for i in range(parts)]
