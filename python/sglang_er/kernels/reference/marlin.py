"""``MarlinWeight`` in plain torch: its rounding, and where a level lies, by the formulas of its docstring."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang_er.kernels.marlin_weight import TILE_COLS, MarlinWeight

# Places are 8 bytes a level: some inputs at a time.
_INPUTS_AT_ONCE = 64 * TILE_COLS


def quantize(weight: torch.Tensor, out: MarlinWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels uint8 ``[N, K]``, scales ``[N, K/G]`` and zero points uint8 ``[N, K/G]`` of any rows of the weight."""
    dtype = out.placed_scales.dtype
    values = weight.float().unflatten(1, (-1, out.group_size))
    # Zero is among the levels: the zero point is one of them.
    low, high = values.amin(dim=2).clamp_max(0), values.amax(dim=2).clamp_min(0)
    # By a tensor: GPUs divide by a number as they multiply by its reciprocal, which rounds twice.
    levels_apart = torch.full_like(high, 15)
    scales = (high / levels_apart - low / levels_apart).to(dtype).clamp_min(torch.finfo(dtype).tiny)
    inverse_scales = 1.0 / scales.float()
    zeros = (-low * inverse_scales).nan_to_num(0.0, 15.0, 0.0).round().clamp(0, 15)
    levels = (values * inverse_scales.unsqueeze(2)).round() + zeros.unsqueeze(2)
    levels = levels.nan_to_num(0.0, 15.0, 0.0).clamp(0, 15).to(torch.uint8)
    return levels.flatten(1), scales, zeros.to(torch.uint8)


def _blocks(weight: MarlinWeight) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Inputs, and for them the flat place of the word and the shift of every level, int64 [inputs, N]."""
    n = torch.arange(weight.out_features, device=weight.device)
    for first in range(0, weight.in_features, _INPUTS_AT_ONCE):
        inputs = slice(first, min(first + _INPUTS_AT_ONCE, weight.in_features))
        k = torch.arange(inputs.start, inputs.stop, device=weight.device).unsqueeze(1)
        word = n // 64 * 128 + (n % 8 * 4 + k % 8 // 2) * 4 + n % 64 // 16
        shift = 4 * (k % 2 * 4 + n % 16 // 8 * 2 + k % 16 // 8)
        yield inputs, k // 16 * (2 * weight.out_features) + word, shift


def _order(weight: MarlinWeight) -> torch.Tensor:
    """Place of every output among the scales, int64 [N]."""
    n = torch.arange(weight.out_features, device=weight.device)
    return n // 64 * 64 + n % 8 * 8 + n % 64 // 8


def _zero_places(weight: MarlinWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Word and shift of every output's zero point, int64 [N]."""
    place = _order(weight)
    return place // 8, 4 * (place % 2 * 4 + place % 8 // 2)


def _signed(words: torch.Tensor) -> torch.Tensor:
    """int64 0..2^32 as the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(weight: MarlinWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels uint8 [N, K], scales [N, K/G], zero points uint8 [N, K/G], by output and input."""
    levels = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    words = weight.packed.reshape(-1)
    for inputs, place, shift in _blocks(weight):
        levels[:, inputs] = (words[place] >> shift & 15).to(torch.uint8).t()
    word, shift = _zero_places(weight)
    zeros = (weight.placed_zeros[:, word] >> shift & 15).to(torch.uint8)
    return levels, weight.placed_scales[:, _order(weight)].t(), zeros.t()


def values(weight: MarlinWeight) -> torch.Tensor:
    """The weight ``[N, K]`` as the kernel multiplies by it, in the dtype of its scales."""
    levels, scales, zeros = unpack(weight)
    differences = levels.float().unflatten(1, (-1, weight.group_size)) - zeros.float().unsqueeze(2)
    return (differences * scales.float().unsqueeze(2)).to(scales.dtype).flatten(1)


def pack(levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, out: MarlinWeight) -> None:
    """The inverse; `out` is a whole weight."""
    words = torch.zeros(out.packed.numel(), dtype=torch.int64, device=out.device)
    for inputs, place, shift in _blocks(out):
        words.index_add_(0, place.flatten(), (levels[:, inputs].t().long() << shift).flatten())
    out.packed.copy_(_signed(words).view(out.packed.shape))
    out.placed_scales[:, _order(out)] = scales.t().contiguous()
    word, shift = _zero_places(out)
    zero_words = torch.zeros(out.placed_zeros.shape, dtype=torch.int64, device=out.device)
    zero_words.index_add_(1, word, zeros.t().long() << shift)
    out.placed_zeros.copy_(_signed(zero_words))
