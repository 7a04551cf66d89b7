from __future__ import annotations

import torch

from sglang_er.kernels.kv_shadow import KvShadow

_MIN_SCALE = 2.0**-126


def kv_shadow_store(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, shadow: KvShadow) -> None:
    key_rows, value_rows = keys[slots].float(), values[slots].float()
    if shadow.bits == 8:
        shadow.keys[slots], shadow.key_scales[slots] = _quantize(key_rows, 127.0, 0.0, -127, 127, torch.int8)
        shadow.values[slots], shadow.value_scales[slots] = _quantize(value_rows, 127.0, 0.0, -127, 127, torch.int8)
        return
    levels, shadow.key_scales[slots] = _quantize(rotate(key_rows), 8.0, 7.5, 0, 15, torch.uint8)
    shadow.keys[slots] = levels[..., 0::2] | levels[..., 1::2] << 4
    levels, shadow.value_scales[slots] = _quantize(value_rows, 8.0, 7.5, 0, 15, torch.uint8)
    halves = levels.unflatten(2, (-1, 2, 16))
    shadow.values[slots] = (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(2)


def rotate(rows: torch.Tensor) -> torch.Tensor:
    """Normalized Walsh-Hadamard transform over blocks of the largest power of two that divides the last dimension."""
    dim = rows.shape[-1]
    block = dim & -dim
    half = 1
    while half < block:
        low, high = rows.unflatten(-1, (-1, 2, half)).unbind(-2)
        rows = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        half *= 2
    return rows * (torch.ones((), dtype=rows.dtype) / torch.tensor(block, dtype=rows.dtype).sqrt()).to(rows.device)


def dequantize_keys(shadow: KvShadow, precision: torch.dtype) -> torch.Tensor:
    """``[slots, kv_heads, head_dim]``; those of an int4 shadow come back rotated."""
    if shadow.bits == 8:
        levels = shadow.keys.to(precision)
    else:
        levels = torch.stack([shadow.keys & 15, shadow.keys >> 4], dim=-1).flatten(2).to(precision) - 7.5
    return levels * shadow.key_scales.to(precision)[..., None]


def dequantize_values(shadow: KvShadow, precision: torch.dtype) -> torch.Tensor:
    """``[slots, kv_heads, value_dim]``"""
    if shadow.bits == 8:
        levels = shadow.values.to(precision)
    else:
        bytes_of_chunk = shadow.values.unflatten(2, (-1, 1, 16))
        levels = torch.cat([bytes_of_chunk & 15, bytes_of_chunk >> 4], dim=3).flatten(2).to(precision) - 7.5
    return levels * shadow.value_scales.to(precision)[..., None]


def _quantize(
    rows: torch.Tensor, steps: float, shift: float, low: int, high: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    largest = rows.abs().amax(dim=-1)
    # By a tensor: GPUs divide by a number as they multiply by its reciprocal, which rounds twice.
    scales = (largest / torch.full_like(largest, steps)).bfloat16().clamp_min(_MIN_SCALE)
    inverse = 1.0 / scales.float()
    levels = (rows * inverse[..., None] + shift).round().clamp(low, high)
    return levels.to(dtype), scales
