"""``quantize_pack`` into Marlin's layout: plain torch on any device, some rows at a time, in bounded memory."""

from __future__ import annotations

import torch

from sglang_er.kernels.marlin_weight import TILE_ROWS, MarlinWeight, QuantizedWeight
from sglang_er.kernels.reference.marlin import quantize

# Some twenty bytes of intermediate values each.
_WEIGHTS_AT_ONCE = 1 << 23


def serves(weight: torch.Tensor, clip_search: bool, out: QuantizedWeight) -> bool:
    return isinstance(out, MarlinWeight) and not clip_search


def quantize_pack(weight: torch.Tensor, clip_search: bool, out: MarlinWeight) -> None:
    del clip_search  # the whole range
    rows = max(1, _WEIGHTS_AT_ONCE // (out.in_features * TILE_ROWS)) * TILE_ROWS
    for first in range(0, out.out_features, rows):
        count = min(rows, out.out_features - first)
        levels, scales, zeros = quantize(weight[first : first + count].detach(), out)
        _place(levels, scales, zeros, out.rows(first, count))


def _place(levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, out: MarlinWeight) -> None:
    """`out`: the rows' part of the buffers."""
    # n: tile, of 16, half, of 8; k: tile, half, pair, which of the pair.
    placed = levels.unflatten(1, (-1, 2, 4, 2)).unflatten(0, (-1, 4, 2, 8))
    # k tile, n tile, of 8, pair, of 16, which of the pair, n half, k half
    placed = placed.permute(4, 0, 3, 6, 1, 7, 2, 5)
    out.packed.view(torch.uint8).copy_((placed[..., 0] | placed[..., 1] << 4).flatten(1))

    def order(values: torch.Tensor) -> torch.Tensor:
        """``[N, K/G]`` to ``[K/G, N]``, every 64 outputs transposed as 8x8."""
        return values.t().unflatten(1, (-1, 8, 8)).transpose(2, 3).flatten(1)

    out.placed_scales.copy_(order(scales))
    eights = order(zeros).unflatten(1, (-1, 2, 2, 2))  # word, half of the four, which nibble, even or odd
    nibbles = eights.permute(0, 1, 4, 2, 3)
    out.placed_zeros.view(torch.uint8).copy_((nibbles[..., 0] | nibbles[..., 1] << 4).flatten(1))
