"""argmax(logits / temperature + Gumbel noise of a hash): logits [R, V] bf16, fp16 or fp32, all arithmetic in fp64.

One launch: a program for a row and a block of 1024 logits leaves the block's best score and where it is, the last one
of the row compares those. Bound: one read of the logits; two logarithms in fp64 a logit where that arithmetic is slow.

The noise is SGLang's: MurmurHash3 (x86, 32 bits, seed 0; Austin Appleby, public domain) of seed, position and column as
four 32-bit words, as a share of 2^32 - 1, then -log(-log(x)), with both ends of the hash kept from infinity.
"""
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.triton.arrival import arrives_last, counters

BLOCK = 1024
NUM_WARPS = 4

_LARGEST = tl.constexpr(4294967295.0)
_LEAST_LOG = tl.constexpr(-1.7976931348623157e308)
_GREATEST_LOG = tl.constexpr(-(2.0**-32))


@triton.jit
def _rotate(x, BITS: tl.constexpr):
    return (x << BITS) | (x >> (32 - BITS))


@triton.jit
def _mix(state, word):
    word = _rotate(word * 0xCC9E2D51, 15) * 0x1B873593
    return _rotate(state ^ word, 13) * 5 + 0xE6546B64


@triton.jit
def hashed(seed, position, columns):
    """uint32 of a row's seed and position (int64) and int32 columns."""
    state = _mix(_mix((seed & 0).to(tl.uint32), seed.to(tl.uint32)), (seed >> 32).to(tl.uint32))
    state = _mix(_mix(state, position.to(tl.uint32)), columns.to(tl.uint32)) ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    return state ^ (state >> 16)


@triton.jit(do_not_specialize_on_alignment=["temperatures", "seeds", "positions", "tokens"])
def _choose(
    logits,
    temperatures,
    seeds,
    positions,
    scores,
    places,
    arrived,
    tokens,
    logits_row,
    blocks,
    size,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(logits + row.to(tl.int64) * logits_row + columns, mask=inside, other=float("-inf"))
    uniform = hashed(tl.load(seeds + row), tl.load(positions + row), columns).to(tl.float64) / _LARGEST
    logs = tl.minimum(tl.maximum(tl.log(uniform), _LEAST_LOG), _GREATEST_LOG)
    score = values.to(tl.float64) / tl.load(temperatures + row).to(tl.float64) - tl.log(-logs)
    best = tl.max(score, axis=0)
    tl.store(scores + row * blocks + block, best)
    tl.store(places + row * blocks + block, tl.min(tl.where(score == best, columns, size), axis=0))
    if arrives_last(arrived, row, blocks):
        index = tl.arange(0, BLOCKS)
        bests = tl.load(scores + row * blocks + index, mask=index < blocks, other=float("-inf"))
        place = tl.load(places + row * blocks + index, mask=index < blocks, other=size)
        chosen = tl.min(tl.where(bests == tl.max(bests, axis=0), place, size), axis=0)
        # A row with a NaN is outside the contract, but what is chosen is used as an index.
        tl.store(tokens + row, tl.minimum(chosen, size - 1).to(tl.int64))


def choose_seeded(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
) -> None:
    rows, size = logits.shape
    blocks = triton.cdiv(size, BLOCK)
    scores = torch.empty((rows, blocks), dtype=torch.float64, device=logits.device)
    places = torch.empty((rows, blocks), dtype=torch.int32, device=logits.device)
    arrived = counters(rows, logits.device)
    _choose[(rows, blocks)](
        *(logits, temperatures, seeds, positions, scores, places, arrived, tokens, logits.stride(0), blocks, size),
        BLOCK=BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


_CHOOSE = {"temperatures": "*fp32", "seeds": "*i64", "positions": "*i64", "scores": "*fp64", "places": "*i32"}
_CHOOSE |= {"arrived": "*i32", "tokens": "*i64", "logits_row": "i32", "blocks": "i32", "size": "i32"}
SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (_choose, {"logits": dtype} | _CHOOSE, {"BLOCK": BLOCK, "BLOCKS": 256}) for dtype in ("*bf16", "*fp16", "*fp32")
]
