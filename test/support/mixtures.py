"""Random mixtures of experts, and what they give by the formula in fp64, token by token, with a bound on the error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import silu

from sglang_er.kernels import PackedWeight
from sglang_er.kernels.reference.dequantize import dequantize
from sglang_er.kernels.reference.quantize_pack import quantize_pack

# Error allowed: fp32 accumulation relative to sum_k |x_k| (15 scale + |zero|), and roundings to the dtype of x.
ACCUMULATION = 2.0**-19
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-22}


class Mixture(NamedTuple):
    """The arguments of `kernels.w4a16_experts`, in their order."""

    x: torch.Tensor
    gate_up: PackedWeight
    down: PackedWeight
    experts: torch.Tensor
    weights: torch.Tensor


def mixture(
    tokens: int,
    sizes: tuple[int, int, int],
    choices: int,
    group: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    others: float = 0.15,
) -> Mixture:
    """`sizes`: outputs, inner size, number of experts; `others`: share of the choices that are another rank's."""
    (outputs, inner, count), generator = sizes, torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, outputs, generator=generator).to(dtype)
    packed = []
    for rows, cols in ((count * 2 * inner, outputs), (count * outputs, inner)):
        weight = PackedWeight.empty(rows, cols, group)
        quantize_pack(torch.randn(rows, cols, generator=generator) * cols**-0.5, False, weight)
        packed.append(weight)
    experts = torch.rand(tokens, max(count, choices), generator=generator).argsort(-1)[:, :choices] % count
    experts[torch.rand(tokens, choices, generator=generator) < others] = -1
    weights = torch.rand(tokens, choices, generator=generator)
    return Mixture(x, packed[0], packed[1], experts.to(torch.int32), weights)


def truth(of: Mixture, rounding: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 [T, K]: the result and how far from it one may be; `rounding`: of a value between the products, in place of
    that of x's dtype."""
    (tokens, outputs), inner = of.x.shape, of.down.in_features
    rounded = ROUNDING[of.x.dtype] if rounding is None else rounding
    first, first_size = (part.view(-1, 2 * inner, outputs) for part in _values(of.gate_up))
    second, second_size = (part.view(-1, outputs, inner) for part in _values(of.down))
    result = torch.zeros(tokens, outputs, dtype=torch.float64)
    bound = torch.full_like(result, 1e-30)
    for token in range(tokens):
        row = of.x[token].double()
        for expert, weight in zip(of.experts[token].tolist(), of.weights[token].double()):
            if expert < 0:
                continue
            gate, up = (first[expert] @ row).chunk(2)
            gate_off, up_off = (ACCUMULATION * (first_size[expert] @ row.abs())).chunk(2)
            hidden = silu(gate) * up
            # silu is nowhere steeper than 1.1
            off = 1.1 * gate_off * (up.abs() + up_off) + silu(gate).abs() * up_off + rounded * hidden.abs()
            result[token] += weight * (second[expert] @ hidden)
            moved = second[expert].abs() @ off + ACCUMULATION * (second_size[expert] @ (hidden.abs() + off))
            bound[token] += weight * (moved + 2.0**-22 * (second[expert] @ hidden).abs())
    return result, bound + ROUNDING[of.x.dtype] * result.abs()


def _values(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """What it stands for, and 15 scale + |zero|."""
    values = torch.empty(weight.shape, dtype=torch.float32)
    dequantize(weight, values)
    largest = (15 * weight.scales.double() + weight.zeros.double().abs()).repeat_interleave(weight.group_size, 1)
    return values.double(), largest[:, : weight.in_features]
