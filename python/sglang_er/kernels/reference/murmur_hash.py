"""Seeded noise: the 32-bit MurmurHash3 that SGLang's seeded sampler draws from, in torch for any device.

SGLang hashes (seed low, seed high, position, column) as four 32-bit blocks with seed 0 (Appleby, MurmurHash3
x86_32, public domain algorithm); its own implementation is Triton or an AMX-only CPU extension.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def _rotl(x: torch.Tensor, r: int) -> torch.Tensor:
    return ((x << r) | (x >> (32 - r))) & _MASK


def _mul32(x: torch.Tensor, constant: int) -> torch.Tensor:
    """x * constant mod 2**32 for x in [0, 2**32) held in int64: split so that no product leaves 63 bits."""
    low, high = constant & 0xFFFF, constant >> 16
    return (x * low + (((x * high) & 0xFFFF) << 16)) & _MASK


def _mix(h: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    k = _mul32(_rotl(_mul32(k, 0xCC9E2D51), 15), 0x1B873593)
    h = _rotl(h ^ k, 13)
    return (h * 5 + 0xE6546B64) & _MASK


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """seed [n] (any integer dtype, 64 bits used), positions [n], col_indices [m] -> uint32 values as int64 [n, m]."""
    if seed.shape != positions.shape or seed.dim() != 1 or col_indices.dim() != 1:
        raise ValueError(f"seed and positions must be [n], columns [m]; got {seed.shape}, {positions.shape}")
    seed = seed.to(torch.int64)
    rows = torch.zeros_like(seed)
    for block in (seed & _MASK, (seed >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        rows = _mix(rows, block)
    h = _mix(rows[:, None], col_indices.to(torch.int64)[None, :] & _MASK)
    h = h ^ 16
    h = _mul32(h ^ (h >> 16), 0x85EBCA6B)
    h = _mul32(h ^ (h >> 13), 0xC2B2AE35)
    return h ^ (h >> 16)
