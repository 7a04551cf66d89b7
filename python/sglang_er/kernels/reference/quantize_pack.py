from __future__ import annotations

import torch

from sglang_er.kernels.base import ROW_BLOCK, PackedWeight
from sglang_er.kernels.marlin_weight import QuantizedWeight
from sglang_er.kernels.reference import marlin
from sglang_er.kernels.reference.clip_search import clip_search as search

_MIN_SCALE = 2.0**-126


def quantize_pack(weight: torch.Tensor, clip_search: bool, out: QuantizedWeight) -> None:
    if not isinstance(out, PackedWeight):  # nobody searches there
        marlin.pack(*marlin.quantize(weight.detach(), out), out)
        return
    group_size = out.group_size
    blocks, groups = out.packed.shape[:2]
    values = weight.detach().float()
    # The last group's minimum and maximum are those of its real weights: pad with a weight of the group itself.
    padding = groups * group_size - out.in_features
    values = torch.cat([values, values[:, -1:].expand(-1, padding)], dim=1).view(-1, groups, group_size)

    low, high = values.amin(dim=2), values.amax(dim=2)
    # By a tensor: GPUs divide by a number as they multiply by its reciprocal, which rounds twice.
    levels_apart = torch.full_like(high, 15)
    scales, zeros = _code(high / levels_apart - low / levels_apart, low)
    if clip_search:
        live = torch.arange(groups * group_size, device=values.device).view(groups, group_size) < out.in_features
        scales, zeros = search(values, live, scales, _code)
    inverse_scales = 1.0 / scales.float()
    levels = (values - zeros.float().unsqueeze(2)) * inverse_scales.unsqueeze(2)
    levels = levels.nan_to_num(0.0, 15.0, 0.0).clamp(0, 15).round().to(torch.uint8)
    if padding:
        levels[:, -1, group_size - padding :] = 0

    out.packed.copy_(_pack_levels(_pad_rows(levels, blocks)))
    scales_zeros = torch.stack([scales, zeros], dim=2)  # row, group, 2
    out.scales_zeros.copy_(_pad_rows(scales_zeros, blocks).permute(0, 2, 3, 1))


def _code(steps: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 scale and zero of a step and of the lowest level."""
    largest = torch.finfo(torch.bfloat16).max
    # -0 becomes +0, as does infinity the largest number
    return steps.bfloat16().clamp_min(_MIN_SCALE), (low + 0.0).bfloat16().clamp(-largest, largest)


def _pad_rows(values: torch.Tensor, blocks: int) -> torch.Tensor:
    """``[N, ...]`` to ``[N/16, 16, ...]``, missing rows zero."""
    padded = values.new_zeros((blocks * ROW_BLOCK, *values.shape[1:]))
    padded[: values.shape[0]] = values
    return padded.unflatten(0, (blocks, ROW_BLOCK))


def _pack_levels(levels: torch.Tensor) -> torch.Tensor:
    """``[block, lane, group, input]`` to bytes ``[block, group, word, lane, 4]``."""
    words = levels.shape[3] // 8
    nibbles = levels.unflatten(3, (4, words, 2))  # position, word, half
    nibbles = nibbles.permute(0, 2, 4, 1, 5, 3)  # block, group, word, lane, half, position
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4  # half, byte of the half
    return packed.flatten(4)
