from __future__ import annotations

import torch

from sglang_er.kernels.cpu.loader import library


def bf16_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    library().bf16_linear(x, weight, bias, out, torch.get_num_threads())
