from __future__ import annotations

import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.marlin_weight import QuantizedWeight
from sglang_er.kernels.reference import marlin


def dequantize(weight: QuantizedWeight, out: torch.Tensor) -> None:
    if not isinstance(weight, PackedWeight):
        out.copy_(marlin.values(weight))
        return
    # In float64, where q * scale is exact and cannot overflow; rounded once.
    groups = weight.scales.shape[1]
    levels = unpack_levels(weight).view(-1, groups, weight.group_size).double()
    values = levels * weight.scales.double().unsqueeze(2) + weight.zeros.double().unsqueeze(2)
    out.copy_(values.flatten(1)[:, : weight.in_features])


def unpack_levels(weight: PackedWeight) -> torch.Tensor:
    """uint8 ``[N, padded K]``: the 4-bit levels in the order of the inputs."""
    low, high = weight.packed & 15, weight.packed >> 4
    # Four bytes of two nibbles: two halves of four positions.
    nibbles = torch.stack([low, high], dim=-1)
    blocks, groups, words, lanes = weight.packed.shape[:4]
    nibbles = nibbles.view(blocks, groups, words, lanes, 2, 4)
    by_input = nibbles.permute(0, 3, 1, 5, 2, 4)  # block, lane, group, position, word, half
    return by_input.reshape(blocks * lanes, -1)[: weight.out_features]
