"""softmax(logits / temperatures): logits [R, V] bf16, fp16 or fp32, out fp32, rows any distance apart.

Two launches. `_measure`, one program for a row and a block of 1024 logits, leaves the largest logit and the sum of
e^((logit - largest) / temperature); `_normalize` joins those of the row (1.8 KiB at 152k) and writes a tile of it.
Bound: two reads of the logits, one write of the probabilities; a tile is read before it is overwritten, so `out` may
be `logits`. A row of 152k has 149 blocks, more than an H100 has processors; many rows take larger tiles, so that
joining is rare. Sums are over the same blocks at any tile, and so a row has the same bits in any batch.

Relative error of a probability e^-d below the largest of its row, u = 2^-24: at most u (3 d + 3 ln V + 16), beside
2^-125 for what underflows. Differences, the factor log2(e) / temperature and their product are rounded once each (3 d
for the value, on average at most 3 ln V for the sum), exp2 twice 4 u, sums are fp64, the rest is normalization.
"""
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
NUM_WARPS = 4
TILE = 4096
MANY_ROWS = 8
# Kernels of this package are compiled for what gives wide loads and stores, and not again for what changes from call to
# call: the number of rows, and where columns of a value a row begin, which are views of larger buffers.

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def anchor(largest):
    """What to subtract: 0 where all is -inf, which would give NaN for a weight of 0."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def scale_of(temperatures, row):
    """log2(e) / temperature."""
    return (1.0 / tl.load(temperatures + row).to(tl.float64) * _LOG2_E).to(tl.float32)


@triton.jit
def measure(logits, temperatures, tops, sums, row, block, logits_row, blocks, size, BLOCK: tl.constexpr):
    """tops[row, block]: the largest logit of the block; sums[row, block]: of e^((logit - largest) / temperature)."""
    columns = block * BLOCK + tl.arange(0, BLOCK)
    source = logits + row.to(tl.int64) * logits_row + columns
    values = tl.load(source, mask=columns < size, other=float("-inf")).to(tl.float32)
    top = tl.max(values, axis=0)
    powers = tl.exp2((values - anchor(top)) * scale_of(temperatures, row))
    tl.store(tops + row * blocks + block, top)
    tl.store(sums + row * blocks + block, tl.sum(powers.to(tl.float64), axis=0))


@triton.jit
def join(temperatures, tops, sums, row, blocks, BLOCKS: tl.constexpr):
    """What `measure` left of a row -> (what to subtract, log2(e) / temperature, the row's sum in fp64)."""
    index = tl.arange(0, BLOCKS)
    tops = tl.load(tops + row * blocks + index, mask=index < blocks, other=float("-inf"))
    sums = tl.load(sums + row * blocks + index, mask=index < blocks, other=0.0)
    scale = scale_of(temperatures, row)
    top = anchor(tl.max(tops, axis=0))
    return top, scale, tl.sum(sums * tl.exp2((tops - top) * scale).to(tl.float64), axis=0)


@triton.jit(do_not_specialize_on_alignment=["temperatures"])
def _measure(logits, temperatures, tops, sums, logits_row, blocks, size, BLOCK: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1)
    measure(logits, temperatures, tops, sums, row, block, logits_row, blocks, size, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["temperatures"])
def _normalize(
    logits,
    temperatures,
    tops,
    sums,
    out,
    logits_row,
    out_row,
    blocks,
    size,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0)
    top, scale, total = join(temperatures, tops, sums, row, blocks, BLOCKS)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < size
    row = row.to(tl.int64)
    values = tl.load(logits + row * logits_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
    # A row of nothing but -inf has the total 0: 0 * inf is the NaN it shall be.
    powers = tl.exp2((values - top) * scale) * (1.0 / total).to(tl.float32)
    tl.store(out + row * out_row + columns, powers, mask=inside)


def softmax_rows(logits: torch.Tensor, temperatures: torch.Tensor, out: torch.Tensor) -> None:
    rows, size = logits.shape
    blocks = triton.cdiv(size, BLOCK)
    tops = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    sums = torch.empty((rows, blocks), dtype=torch.float64, device=logits.device)
    tile = TILE if rows >= MANY_ROWS else BLOCK
    _measure[(rows, blocks)](
        *(logits, temperatures, tops, sums, logits.stride(0), blocks, size),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    _normalize[(rows, triton.cdiv(size, tile))](
        *(logits, temperatures, tops, sums, out, logits.stride(0), out.stride(0), blocks, size),
        TILE=tile,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


_SIZES = {"logits_row": "i32", "blocks": "i32", "size": "i32"}
_MEASURE = {"temperatures": "*fp32", "tops": "*fp32", "sums": "*fp64"} | _SIZES
_NORMALIZE = _MEASURE | {"out": "*fp32", "out_row": "i32"}
SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    spec
    for dtype in ("*bf16", "*fp16", "*fp32")
    for spec in (
        (_measure, {"logits": dtype} | _MEASURE, {"BLOCK": BLOCK}),
        (_normalize, {"logits": dtype} | _NORMALIZE, {"TILE": BLOCK, "BLOCKS": 256}),
        (_normalize, {"logits": dtype} | _NORMALIZE, {"TILE": TILE, "BLOCKS": 256}),
    )
]
