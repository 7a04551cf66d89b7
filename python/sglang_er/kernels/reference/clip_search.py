"""Which range of each group's weights loses least; csrc/include/sglang_er/clip_search.h has the rule and its units."""

from __future__ import annotations

from collections.abc import Callable

import torch

CUTS = ((0, 0), (0, 2), (1, 1), (2, 0), (0, 3), (3, 0), (2, 3), (3, 2))
"""64ths of the range that candidates cut off below and above; ranges never grow from one to the next."""
UNITS = 1024
OUTSIDE = 1440
LOWEST, HIGHEST = -4.0, 19.0
RATIO = 16384

Code = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def clip_search(
    values: torch.Tensor, live: torch.Tensor, scales: torch.Tensor, code: Code
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 scales and zeros, [rows, groups] each, of the best ranges.

    `values`: fp32 [rows, groups, group size], `live`: which of them are weights, bool [groups, group size]; the others
    are some weight of the same group. `scales`: bf16, of whole ranges. `code`: bf16 scales and zeros of fp32 ones.
    """
    low, high = values.amin(dim=2), values.amax(dim=2)
    best_scales, best_zeros = code(scales.float(), low)
    s, z, inverse = scales.float(), best_zeros.float(), 1.0 / scales.float()

    def units(x: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return (((x - of(z)) * of(inverse)).clamp(LOWEST, HIGHEST) * UNITS).round().to(torch.int32)

    weights = units(values, lambda per_group: per_group.unsqueeze(2))
    lowest, highest = units(low, lambda per_group: per_group), units(high, lambda per_group: per_group)
    least = torch.full_like(lowest, torch.iinfo(torch.int64).max, dtype=torch.int64)
    allowed = torch.ones_like(lowest, dtype=torch.bool)
    for index, (bottom, top) in enumerate(CUTS):
        made, zeros = code(s * ((64 - bottom - top) / 64), low + s * (15 * bottom / 64))
        zero = units(zeros.float(), lambda per_group: per_group)
        step = (made.float() * inverse * RATIO).round().to(torch.int32)
        factor = (s * (1.0 / made.float()) * RATIO).round().to(torch.int32)
        above = weights - zero.unsqueeze(2)
        level = (above * factor.unsqueeze(2) + (1 << 14)) >> 15
        level = ((level + (1 << 8)) >> 9).clamp(0, 15)
        error = above - ((level * step.unsqueeze(2) + 8) >> 4)
        squares = (error.long() ** 2).mul_(live).sum(dim=2)
        fits = (lowest - zero >= -OUTSIDE) & (highest - zero - ((15 * step + 8) >> 4) <= OUTSIDE)
        if index == 0:
            allowed = fits
        better = allowed & fits & (squares < least)
        least = torch.where(better, squares, least)
        best_scales, best_zeros = torch.where(better, made, best_scales), torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros
