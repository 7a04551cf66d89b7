"""Normalized Walsh-Hadamard transform of rows in registers, for int4 keys and the queries that meet them."""

# mypy: allow-incomplete-defs

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl


def rotation_steps(head_dim: int) -> int:
    """Butterfly steps: the block is the largest power of two that divides ``head_dim``."""
    return int(math.log2(head_dim & -head_dim))


@cache
def rotation_norm(head_dim: int) -> float:
    """1 / sqrt(block), rounded to fp32 as the reference rounds it."""
    block = torch.tensor(head_dim & -head_dim, dtype=torch.float32, device="cpu")
    return float(block.new_ones(()) / block.sqrt())


@triton.jit
def rotate(x, ROWS: tl.constexpr, DIM: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr):
    """fp32 ``x[ROWS, DIM]`` over blocks of ``2^STEPS`` columns; sums in the reference's order: the same bits."""
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(x, (ROWS, DIM // (2 << step), 2, 1 << step))
        low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)), (ROWS, DIM))
    return x * NORM
