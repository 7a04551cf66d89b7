from __future__ import annotations

import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.cpu.loader import library


def w4a8_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    threads = torch.get_num_threads()
    library().w4a8_linear(x, weight.packed, weight.scales_zeros, bias, out, weight.group_size, threads)
