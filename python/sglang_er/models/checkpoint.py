"""Writes a Hugging Face checkpoint: config, tokenizer, generation config, safetensors shards one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_er.models import tokenizer

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1 << 30


def write_metadata(directory: Path, config: dict[str, Any]) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = tokenizer.special_ids()
    generation = {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_tokenizer(directory)


def write_weights(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Write tensors as they come, a shard of about 1 GiB at a time, so that no more than a shard is in memory.

    Returns the bytes written. Shards are named when their number is known, as transformers expects them.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        nonlocal pending_bytes
        save_file(pending, directory / f"shard-{len(shards)}.partial", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        pending_bytes += size
        total += size
    flush()
    if len(shards) == 1:
        (directory / "shard-0.partial").rename(directory / "model.safetensors")
        return total
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        target = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}.partial").rename(directory / target)
        index |= dict.fromkeys(names, target)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return total
