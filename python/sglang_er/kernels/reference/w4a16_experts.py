from __future__ import annotations

import torch
from torch.nn.functional import silu

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.reference.dequantize import dequantize


def w4a16_experts(
    x: torch.Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    experts: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    # Every expert for every token, so that no value is looked at on the host. fp32 at least; fp64 if x is fp64.
    inputs = x.to(torch.promote_types(x.dtype, torch.float32))
    total = torch.zeros_like(inputs)
    for expert in range(down.out_features // x.shape[1]):
        gate, up = (inputs @ _of(gate_up, expert, 2 * down.in_features).to(inputs.dtype).T).chunk(2, dim=-1)
        result = (silu(gate) * up) @ _of(down, expert, x.shape[1]).to(inputs.dtype).T
        chosen = experts == expert
        weight = torch.where(chosen, weights.to(inputs.dtype), 0.0).sum(-1, keepdim=True)
        # Not by a weight of 0: what no token chose may not be finite.
        total += torch.where(chosen.any(-1, keepdim=True), weight * result, 0.0)
    out.copy_(total)


def _of(weight: PackedWeight, expert: int, rows: int) -> torch.Tensor:
    values = torch.empty((rows, weight.in_features), dtype=torch.float32, device=weight.device)
    dequantize(weight.rows(expert * rows, rows), values)
    return values
