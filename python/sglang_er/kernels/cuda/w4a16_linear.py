"""``w4a16_linear`` on a GPU: csrc/cuda/w4a16_linear.cu."""

from __future__ import annotations

import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.cuda import w4_linear
from sglang_er.kernels.marlin_weight import QuantizedWeight


def serves(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> bool:
    return w4_linear.serves("w4a16_linear", x, weight, out)


def w4a16_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    library, partials, counters = w4_linear.prepared("w4a16_linear", x, weight, out)
    library.w4a16_linear(x, weight.packed, weight.scales_zeros, bias, out, weight.group_size, partials, counters)
