"""One index a row by inverse transform: weights [R, V] or [R, W, V], the last dimension contiguous, rows anywhere.

Two launches. `_weigh`, one program for a row and a block of 1024 weights, leaves the block's sum in fp64;
`_pick`, one program a row, scans the sums of the blocks, then the weights of the one block that holds the coin.
Bound: one read of the weights (and of what is subtracted); sums are 16 bytes a block. A row of 152k has 149 blocks,
more than an H100 has processors, so that a single row fills it.

Scans add in a tree, so a prefix may lie below the one before it by a rounding. An index is therefore taken only if it
has weight; where no prefix exceeds the coin's share, it is the last one that has. Sums depend on the row alone; their
last bit also on the alignment of its strides.
"""
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def load_weights(p, q, subtracting, block, size, BLOCK: tl.constexpr):
    """(w, p) of one block in fp64: w = max(p - q, 0), or p if not `subtracting`; 0 beyond the row."""
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    plain = tl.load(p + columns, mask=inside, other=0.0).to(tl.float64)
    both = (inside & subtracting) != 0  # "!= 0": the interpreter makes integers of a block and a scalar
    less = tl.load(q + columns, mask=both, other=0.0).to(tl.float64)
    return tl.where(plain > less, plain - less, 0.0), plain


@triton.jit
def store_sums(p, q, subtracting, sums, row, rows, block, blocks, size, BLOCK: tl.constexpr):
    """sums[0, row, block] of w, sums[1, row, block] of p: should no w be left, the draw is from p."""
    weights, plain = load_weights(p, q, subtracting, block, size, BLOCK)
    tl.store(sums + row * blocks + block, tl.sum(weights, axis=0))
    tl.store(sums + (rows + row) * blocks + block, tl.sum(plain, axis=0))


@triton.jit
def first_above(weights, before, threshold):
    """First index with weight whose inclusive prefix exceeds `threshold`; else the last with weight; else 0."""
    SIZE: tl.constexpr = weights.shape[0]
    index = tl.arange(0, SIZE)
    has_weight = weights > 0.0
    above = has_weight & (before + tl.cumsum(weights, axis=0) > threshold)
    first = tl.min(tl.where(above, index, SIZE), axis=0)
    last = tl.max(tl.where(has_weight, index, 0), axis=0)
    return tl.where(first < SIZE, first, last)


@triton.jit
def draw(p, q, subtracting, sums, row, rows, blocks, coin, size, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The index that `coin` falls into, from the sums of `store_sums`."""
    index = tl.arange(0, BLOCKS)
    weights = tl.load(sums + row * blocks + index, mask=index < blocks, other=0.0)
    plain = tl.load(sums + (rows + row) * blocks + index, mask=index < blocks, other=0.0)
    left = tl.sum(weights, axis=0) > 0.0
    weights = tl.where(left, weights, plain)
    threshold = coin * tl.sum(weights, axis=0)
    block = first_above(weights, 0.0, threshold)
    before = tl.sum(tl.where(index < block, weights, 0.0), axis=0)
    values, _ = load_weights(p, q, subtracting & left, block, size, BLOCK)
    return block * BLOCK + first_above(values, before, threshold)


@triton.jit
def _rows(p, q, offsets, row, p_row, p_step, q_row, q_step, width, SUBTRACT: tl.constexpr):
    """Addresses of the row's weights and of what is subtracted, and whether anything is."""
    row = row.to(tl.int64)
    if SUBTRACT:
        offset = tl.load(offsets + row)
        return p + row * p_row + offset * p_step, q + row * q_row + offset * q_step, offset < width
    return p + row * p_row, p + row * p_row, row < 0


@triton.jit(do_not_specialize=["width", "rows"], do_not_specialize_on_alignment=["offsets"])
def _weigh(
    p,
    q,
    offsets,
    sums,
    p_row,
    p_step,
    q_row,
    q_step,
    width,
    rows,
    blocks,
    size,
    SUBTRACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    p, q, subtracting = _rows(p, q, offsets, row, p_row, p_step, q_row, q_step, width, SUBTRACT)
    store_sums(p, q, subtracting, sums, row, rows, block, blocks, size, BLOCK)


@triton.jit(do_not_specialize=["width", "rows"], do_not_specialize_on_alignment=["offsets", "coins", "out"])
def _pick(
    p,
    q,
    offsets,
    sums,
    coins,
    out,
    p_row,
    p_step,
    q_row,
    q_step,
    width,
    rows,
    blocks,
    size,
    SUBTRACT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0)
    p, q, subtracting = _rows(p, q, offsets, row, p_row, p_step, q_row, q_step, width, SUBTRACT)
    drawn = draw(p, q, subtracting, sums, row, rows, blocks, tl.load(coins + row), size, BLOCK, BLOCKS)
    # A row without a sum is outside the contract, but what is drawn is used as an index.
    tl.store(out + row, tl.minimum(drawn, size - 1).to(tl.int64))


def sample_rows(
    weights: torch.Tensor,
    subtract: torch.Tensor | None,
    offsets: torch.Tensor | None,
    coins: torch.Tensor,
    out: torch.Tensor,
) -> None:
    rows, size = weights.shape[0], weights.shape[-1]
    blocks = triton.cdiv(size, BLOCK)
    sums = torch.empty((2, rows, blocks), dtype=torch.float64, device=weights.device)
    p_step = q_row = q_step = width = 0
    if subtract is not None:
        p_step = weights.stride(1)
        q_row, q_step, width = subtract.stride(0), subtract.stride(1), subtract.shape[1]
    shared: dict[str, Any] = {"SUBTRACT": subtract is not None, "BLOCK": BLOCK}
    shared |= {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    sources = (weights, weights if subtract is None else subtract, coins if offsets is None else offsets, sums)
    sizes = (weights.stride(0), p_step, q_row, q_step, width, rows, blocks, size)
    _weigh[(rows, blocks)](*sources, *sizes, **shared)
    _pick[(rows,)](*sources, coins, out, *sizes, BLOCKS=triton.next_power_of_2(blocks), **shared)


_SIZES = ("p_row", "p_step", "q_row", "q_step", "width", "rows", "blocks", "size")
_WEIGH = {"p": "*fp32", "q": "*fp32", "offsets": "*i64", "sums": "*fp64"} | dict.fromkeys(_SIZES, "i32")
_PICK = _WEIGH | {"coins": "*fp64", "out": "*i64"}
SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    spec
    for subtract in (False, True)
    for spec in (
        (_weigh, _WEIGH, {"SUBTRACT": subtract, "BLOCK": BLOCK}),
        (_pick, _PICK, {"SUBTRACT": subtract, "BLOCK": BLOCK, "BLOCKS": 256}),
    )
]
