from __future__ import annotations

import torch

from sglang_er.kernels.marlin_weight import QuantizedWeight
from sglang_er.kernels.reference.dequantize import dequantize


def w4a16_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    # fp32 at least; fp64 if x is fp64, which tests use as the truth.
    precision = torch.promote_types(x.dtype, torch.float32)
    values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    dequantize(weight, values)
    result = x.to(precision) @ values.to(precision).T
    if bias is not None:
        result += bias.to(precision)
    out.copy_(result)
