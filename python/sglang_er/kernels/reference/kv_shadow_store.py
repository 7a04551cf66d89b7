from __future__ import annotations

import torch

from sglang_er.kernels.kv_shadow import KvShadow

_MIN_SCALE = 2.0**-126
_LARGEST_FP8 = 448.0


def kv_shadow_store(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, shadow: KvShadow) -> None:
    key_rows, value_rows = keys[slots].float(), values[slots].float()
    if shadow.format != "int4":
        quantize = _quantize_fp8 if shadow.format == "fp8" else _quantize_int8
        shadow.keys[slots], shadow.key_scales[slots] = quantize(key_rows)
        shadow.values[slots], shadow.value_scales[slots] = quantize(value_rows)
        return
    levels, shadow.key_scales[slots] = _quantize_int4(rotate(key_rows))
    shadow.keys[slots] = levels[..., 0::2] | levels[..., 1::2] << 4
    levels, shadow.value_scales[slots] = _quantize_int4(value_rows)
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
    # A number and not a tensor: copying one to a GPU would wait for it.
    return rows * float(torch.ones((), dtype=rows.dtype) / torch.tensor(block, dtype=rows.dtype).sqrt())


def dequantize_keys(shadow: KvShadow, precision: torch.dtype) -> torch.Tensor:
    """``[slots, kv_heads, head_dim]``; those of an int4 shadow come back rotated."""
    if shadow.format == "int4":
        levels = torch.stack([shadow.keys & 15, shadow.keys >> 4], dim=-1).flatten(2).to(precision) - 7.5
    else:
        levels = _plain_levels(shadow, shadow.keys, precision)
    return levels * shadow.key_scales.to(precision)[..., None]


def dequantize_values(shadow: KvShadow, precision: torch.dtype) -> torch.Tensor:
    """``[slots, kv_heads, value_dim]``"""
    if shadow.format == "int4":
        bytes_of_chunk = shadow.values.unflatten(2, (-1, 1, 16))
        levels = torch.cat([bytes_of_chunk & 15, bytes_of_chunk >> 4], dim=3).flatten(2).to(precision) - 7.5
    else:
        levels = _plain_levels(shadow, shadow.values, precision)
    return levels * shadow.value_scales.to(precision)[..., None]


def fp8_codes(levels: torch.Tensor) -> torch.Tensor:
    """uint8: the e4m3fn numbers nearest to fp32 levels, ties to even; larger ones become 448, NaN 0: no code is NaN."""
    inside = levels.nan_to_num(nan=0.0).clamp(-_LARGEST_FP8, _LARGEST_FP8)
    return inside.to(torch.float8_e4m3fn).view(torch.uint8)


def _plain_levels(shadow: KvShadow, levels: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    return (levels.view(torch.float8_e4m3fn) if shadow.format == "fp8" else levels).to(precision)


def _scales(rows: torch.Tensor, steps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the largest magnitude of each row, and their inverses."""
    largest = rows.abs().amax(dim=-1)
    # By a tensor: GPUs divide by a number as they multiply by its reciprocal, which rounds twice.
    scales = (largest / torch.full_like(largest, steps)).bfloat16().clamp_min(_MIN_SCALE)
    return scales, (1.0 / scales.float())[..., None]


def _quantize_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales, inverse = _scales(rows, 127.0)
    return (rows * inverse).round().clamp(-127, 127).to(torch.int8), scales


def _quantize_int4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales, inverse = _scales(rows, 8.0)
    return (rows * inverse + 7.5).round().clamp(0, 15).to(torch.uint8), scales


def _quantize_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales, inverse = _scales(rows, _LARGEST_FP8)
    return fp8_codes(rows * inverse), scales
