from __future__ import annotations

import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.cpu.loader import library


def dequantize(weight: PackedWeight, out: torch.Tensor) -> None:
    library().dequantize(weight.packed, weight.scales_zeros, out, weight.group_size, torch.get_num_threads())
