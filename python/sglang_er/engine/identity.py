"""What makes a step's cost what it is: costs measured on one such engine are wrong on any other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglang_er import __version__

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def measured_on(runner: ModelRunner, ranks: int = 1) -> dict[str, str]:
    """Device, model sizes, dtype, threads, tensor-parallel ranks and plugin version, in words."""
    return known_before(runner.model_config, str(runner.device), ranks, torch.get_num_threads())


def known_before(model: Any, device: str, ranks: int, threads: int | None) -> dict[str, str]:
    """The same from SGLang's ModelConfig, before anything is loaded; without `threads` where they are not known yet."""
    hf = model.hf_text_config
    sizes = (hf.num_hidden_layers, hf.hidden_size, getattr(hf, "intermediate_size", 0), hf.vocab_size)
    known = {
        "device": device_name(device),
        "model": f"{model.hf_config.architectures[0]} {'x'.join(map(str, sizes))}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": str(threads),
        "ranks": str(ranks),
        "version": __version__,
    }
    return {name: value for name, value in known.items() if name != "threads" or threads is not None}


def device_name(device: str) -> str:
    """The GPU's name, or what the system calls the processor."""
    where = torch.device(device)
    if where.type != "cpu":
        return str(torch.get_device_module(where.type).get_device_name(where.index))
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return " ".join(fields.get(name, "?") for name in ("model name", "cpu family", "model"))
