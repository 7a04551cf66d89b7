from __future__ import annotations

import torch
from torch.nn.functional import silu

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.cpu.w4a16_linear import w4a16_linear


def w4a16_experts(
    x: torch.Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    experts: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Expert after expert, of those that a token chose."""
    outputs, inner = x.shape[1], down.in_features
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in experts.unique().tolist():
        if expert < 0:
            continue
        token, choice = (experts == expert).nonzero(as_tuple=True)
        both = x.new_empty((len(token), 2 * inner))
        w4a16_linear(x[token], gate_up.rows(expert * 2 * inner, 2 * inner), None, both)
        gate, up = both.chunk(2, dim=-1)
        result = x.new_empty((len(token), outputs))
        w4a16_linear(silu(gate) * up, down.rows(expert * outputs, outputs), None, result)
        total.index_add_(0, token, result.float() * weights[token, choice, None].float())
    out.copy_(total)
