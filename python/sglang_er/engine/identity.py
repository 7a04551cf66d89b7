"""What makes a step's cost what it is: costs measured on one such engine are wrong on any other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sglang_er import __version__

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def measured_on(runner: ModelRunner, ranks: int = 1) -> dict[str, str]:
    """Device, model sizes, dtype, threads, tensor-parallel ranks and plugin version, in words."""
    hf = runner.model_config.hf_text_config
    sizes = (hf.num_hidden_layers, hf.hidden_size, getattr(hf, "intermediate_size", 0), hf.vocab_size)
    return {
        "device": device_name(str(runner.device)),
        "model": f"{runner.model_config.hf_config.architectures[0]} {'x'.join(map(str, sizes))}",
        "dtype": str(runner.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "ranks": str(ranks),
        "version": __version__,
    }


def device_name(device: str) -> str:
    """The current GPU's name, or what the system calls the processor."""
    if device != "cpu":
        return str(torch.get_device_module(device).getdevice_name())
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return " ".join(fields.get(name, "?") for name in ("model name", "cpu family", "model"))
