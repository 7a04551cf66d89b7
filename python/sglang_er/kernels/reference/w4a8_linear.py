from __future__ import annotations

import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.reference.dequantize import dequantize

LEAST_MAXIMUM = 2.0**-110
"""Keeps 127 / maximum finite."""


def quantize_activations(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels ``[M, K]`` and scales ``[M, K/G]``, both fp32, of ``x[M, K]``: the kernels' arithmetic, bit for bit."""
    rows, cols = x.shape
    groups = -(-cols // group_size)
    values = x.new_zeros((rows, groups * group_size), dtype=torch.float32)
    values[:, :cols] = x
    values = values.view(rows, groups, group_size)
    maxima = values.abs().amax(2, keepdim=True).clamp(min=LEAST_MAXIMUM)
    # torch computes a Python number divided by a tensor as reciprocal times number, which rounds twice.
    inverses = torch.full_like(maxima, 127.0) / maxima
    levels = (values * inverses).round()
    scales = (maxima / 127).masked_fill(~values.isfinite().all(2, keepdim=True), torch.nan)
    return levels.flatten(1)[:, :cols], scales[:, :, 0]


def w4a8_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    # fp32 at least; fp64 if x is fp64, which tests use as the truth. The rounding of x is that of fp32 always.
    precision = torch.promote_types(x.dtype, torch.float32)
    levels, scales = quantize_activations(x, weight.group_size)
    scales = scales.to(precision).repeat_interleave(weight.group_size, 1)[:, : weight.in_features]
    values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    dequantize(weight, values)
    result = (levels.to(precision) * scales) @ values.to(precision).T
    if bias is not None:
        result += bias.to(precision)
    out.copy_(result)
