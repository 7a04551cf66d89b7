"""A draft a row and the distribution it was drawn from: logits [R, V] bf16, fp16 or fp32, q fp32 [R, V].

Two launches without filters, ten with. `_measure` is the first of softmax_rows, and sets the counters of the others;
`narrow` (draft_sample_threshold.py) finds, in eight launches, the smallest weight that a row's filters keep; `_finish`
writes a tile of q and the sum of each of its blocks of 1024, and the row's last program draws the token from those sums
and the one block that holds the coin, as sample_rows does: from q as it lies in memory, and no token without q.

Bound: two reads of the logits and one write of q; with filters another read, and what the search still looks at. Rows
without a filter are not searched, whatever their neighbours have. Errors of q: as in softmax_rows.py.
"""
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.triton.arrival import arrives_last
from sglang_er.kernels.triton.draft_sample_threshold import FILTERS, LAST_WAYS, SHIFTS, VIEWS, WAYS, is_limited, narrow
from sglang_er.kernels.triton.draft_sample_threshold import SPECS as _NARROW
from sglang_er.kernels.triton.sample_rows import first_above
from sglang_er.kernels.triton.softmax_rows import BLOCK, MANY_ROWS, NUM_WARPS, TILE, join, measure


@triton.jit(do_not_specialize_on_alignment=["temperatures"])
def _measure(logits, temperatures, tops, sums, arrived, logits_row, blocks, size, BLOCK: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1)
    measure(logits, temperatures, tops, sums, row, block, logits_row, blocks, size, BLOCK)
    tl.store(arrived + row, 0, mask=block == 0)


@triton.jit(do_not_specialize_on_alignment=[*VIEWS, "weighed", "coins", "tokens"])
def _finish(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    tops,
    sums,
    floors,
    totals,
    weighed,
    arrived,
    coins,
    tokens,
    out,
    logits_row,
    out_row,
    blocks,
    size,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row, tile = tl.program_id(0), tl.program_id(1)
    top, scale, total = join(temperatures, tops, sums, row, blocks, BLOCKS)
    block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    columns = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = columns < size
    source = logits + row.to(tl.int64) * logits_row + columns
    values = tl.load(source, mask=inside, other=float("-inf")).to(tl.float32)
    powers = tl.exp2((values - top) * scale)
    if TOP_K or TOP_P or MIN_P:
        limited = is_limited(top_ks, top_ps, min_ps, row, size, TOP_K, TOP_P, MIN_P)
        floor = tl.load(floors + row, mask=limited, other=0)
        powers = tl.where(powers.to(tl.int32, bitcast=True) >= floor, powers, 0.0)
        # A broken row keeps its NaN.
        limited = (limited & (total == total)) != 0
        total = tl.where(limited, tl.load(totals + row, mask=limited, other=0.0), total)
    # A row of nothing but -inf has the total 0: 0 * inf is the NaN it shall be.
    q = powers * (1.0 / total).to(tl.float32)
    target = out + row.to(tl.int64) * out_row
    tl.store(target + columns, q, mask=inside)
    tl.store(weighed + row * blocks + block, tl.sum(q.to(tl.float64), axis=1), mask=block < blocks)
    if arrives_last(arrived, row, tl.num_programs(1)):
        index = tl.arange(0, BLOCKS)
        masses = tl.load(weighed + row * blocks + index, mask=index < blocks, other=0.0)
        threshold = tl.load(coins + row) * tl.sum(masses, axis=0)
        found = first_above(masses, 0.0, threshold)
        before = tl.sum(tl.where(index < found, masses, 0.0), axis=0)
        place = found * BLOCK + tl.arange(0, BLOCK)
        chances = tl.load(target + place, mask=place < size, other=0.0).to(tl.float64)
        token = found * BLOCK + first_above(chances, before, threshold)
        # A row of NaN is outside the contract, but what is drawn is used as an index.
        tl.store(tokens + row, tl.minimum(token, size - 1).to(tl.int64))


def draft_sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor | None,
    top_ps: torch.Tensor | None,
    min_ps: torch.Tensor | None,
    coins: torch.Tensor,
    tokens: torch.Tensor,
    out: torch.Tensor,
) -> None:
    (rows, size), device = logits.shape, logits.device
    blocks, tile_blocks = triton.cdiv(size, BLOCK), TILE // BLOCK if rows >= MANY_ROWS else 1
    tops = torch.empty((rows, blocks), dtype=torch.float32, device=device)
    sums, weighed = torch.empty((2, rows, blocks), dtype=torch.float64, device=device)
    # Wherever the number of rows puts them (VIEWS): kernels do not ask for their alignment.
    arrived, floors, ways, above_counts = torch.empty((4, rows), dtype=torch.int32, device=device)
    above_masses, totals = torch.empty((2, rows), dtype=torch.float64, device=device)
    sizes = (logits.stride(0), blocks, size)
    launch: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    _measure[(rows, blocks)](*(logits, temperatures, tops, sums, arrived, *sizes), BLOCK=BLOCK, **launch)
    # A filter that is not there is not read; its place is taken by the temperatures.
    columns = [temperatures if column is None else column for column in (top_ks, top_ps, min_ps)]
    options: dict[str, Any] = {
        "TOP_K": top_ks is not None,
        "TOP_P": top_ps is not None,
        "MIN_P": min_ps is not None,
        "BLOCK": BLOCK,
        "BLOCKS": triton.next_power_of_2(blocks),
        **launch,
    }
    if top_ks is not None or top_ps is not None or min_ps is not None:
        counts = torch.empty((rows, blocks, WAYS), dtype=torch.int32, device=device)
        masses = torch.empty((rows, blocks, WAYS), dtype=torch.float64, device=device)
        for shift in SHIFTS:
            narrow[(rows, blocks)](
                *(logits, temperatures, *columns, tops, sums, counts, masses, floors, ways),
                *(above_counts, above_masses, totals, arrived, *sizes, shift),
                FIRST=shift == SHIFTS[0],
                WAYS=WAYS if shift else LAST_WAYS,
                **options,
            )
    _finish[(rows, triton.cdiv(blocks, tile_blocks))](
        *(logits, temperatures, *columns, tops, sums, floors, totals, weighed, arrived, coins, tokens, out),
        *(logits.stride(0), out.stride(0), blocks, size),
        TILE_BLOCKS=tile_blocks,
        **options,
    )


_SIZES = {"logits_row": "i32", "blocks": "i32", "size": "i32"}
_MEASURE = {"temperatures": "*fp32", "tops": "*fp32", "sums": "*fp64", "arrived": "*i32"} | _SIZES
_FINISH = _MEASURE | {"top_ks": "*i32", "top_ps": "*fp32", "min_ps": "*fp32", "floors": "*i32", "totals": "*fp64"}
_FINISH |= {"weighed": "*fp64", "coins": "*fp64", "tokens": "*i64", "out": "*fp32", "out_row": "i32"}
SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    *((_measure, {"logits": dtype} | _MEASURE, {"BLOCK": BLOCK}) for dtype in ("*bf16", "*fp16", "*fp32")),
    *_NARROW,
    *(
        (
            _finish,
            {"logits": dtype} | _FINISH,
            {"TILE_BLOCKS": tile, "BLOCK": BLOCK, "BLOCKS": 256}
            | dict(zip(("TOP_K", "TOP_P", "MIN_P"), flags, strict=True)),
        )
        for dtype in ("*fp32", "*bf16")
        for flags in ((False, False, False), *FILTERS)
        for tile in (1, TILE // BLOCK)
    ),
]
