"""``w4a8_linear`` on a GPU: csrc/cuda/w4a8_linear.cu."""

from __future__ import annotations

import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.cuda import w4_linear
from sglang_er.kernels.marlin_weight import QuantizedWeight


def serves(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> bool:
    """As ``w4a16_linear``; `bias` of the dtype of x or fp32."""
    return w4_linear.serves("w4a8_linear", x, weight, out) and (bias is None or bias.dtype in (x.dtype, torch.float32))


def w4a8_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    library, partials, counters = w4_linear.prepared("w4a8_linear", x, weight, out)
    rows, groups = x.shape[0], library.level_groups(weight.in_features)
    levels = torch.empty(rows, groups, weight.group_size, dtype=torch.int8, device=x.device)
    numbers = torch.empty(rows, groups, 2, dtype=torch.float32, device=x.device)
    size = weight.group_size
    library.w4a8_linear(x, weight.packed, weight.scales_zeros, bias, out, size, levels, numbers, partials, counters)
