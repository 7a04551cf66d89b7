"""Verification of a drafted chain: p [B, gamma + 1, V] and q [B, gamma, V] fp32, their last dimension contiguous.

One launch. A program for a chain and a block of 1024 tokens counts the leading drafts that are kept (every block does,
from gamma values each of p, q and the coins), then leaves the block's sum of max(p - q, 0) at the first one rejected,
or of p after the last; the chain's last program draws from it and writes the chain. Bound: one row of p and one of q
per chain, whatever gamma is. How the draw is kept exact: see sample_rows.py.
"""
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.triton.arrival import arrives_last, counters
from sglang_er.kernels.triton.sample_rows import BLOCK, NUM_WARPS, draw, store_sums


@triton.jit(
    do_not_specialize=["drafts_row", "coins_row", "tokens_row", "gamma", "rows"],
    do_not_specialize_on_alignment=["drafts", "accept_coins", "resample_coins", "tokens", "accept_lens"],
)
def _verify(
    p,
    q,
    drafts,
    accept_coins,
    resample_coins,
    tokens,
    accept_lens,
    sums,
    arrived,
    p_row,
    p_step,
    q_row,
    q_step,
    drafts_row,
    coins_row,
    tokens_row,
    gamma,
    rows,
    blocks,
    size,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    chain = row.to(tl.int64)
    p, q = p + chain * p_row, q + chain * q_row
    step = tl.arange(0, WIDTH).to(tl.int64)
    inside = step < gamma
    # Behind the drafts comes the first one again, as padding of the chain: any token id will do.
    token = tl.load(drafts + chain * drafts_row + tl.where(inside, step, 0))
    coin = tl.load(accept_coins + chain * coins_row + step, mask=inside, other=0.0)
    p_token = tl.load(p + step * p_step + token, mask=inside, other=0.0).to(tl.float64)
    q_token = tl.load(q + step * q_step + token, mask=inside, other=0.0).to(tl.float64)
    kept = coin * q_token < p_token
    accepted = tl.min(tl.where(inside & (kept == 0), step, gamma), axis=0)
    p, q = p + accepted * p_step, q + accepted * q_step
    store_sums(p, q, accepted < gamma, sums, row, rows, block, blocks, size, BLOCK)
    if arrives_last(arrived, row, blocks):
        resample = tl.load(resample_coins + row)
        last = draw(p, q, accepted < gamma, sums, row, rows, blocks, resample, size, BLOCK, BLOCKS)
        # A row without a sum is outside the contract, but what is drawn is used as an index.
        last = tl.minimum(last, size - 1).to(tl.int64)
        chosen = tl.where(step == accepted, last, token)
        tl.store(tokens + chain * tokens_row + step, chosen, mask=step <= gamma)
        tl.store(accept_lens + row, (accepted + 1).to(tl.int32))


def verify_chain(
    p: torch.Tensor,
    q: torch.Tensor,
    drafts: torch.Tensor,
    accept_coins: torch.Tensor,
    resample_coins: torch.Tensor,
    tokens: torch.Tensor,
    accept_lens: torch.Tensor,
) -> None:
    rows, gamma, size = q.shape
    blocks = triton.cdiv(size, BLOCK)
    sums = torch.empty((2, rows, blocks), dtype=torch.float64, device=p.device)
    strides = (p.stride(0), p.stride(1), q.stride(0), q.stride(1), drafts.stride(0))
    _verify[(rows, blocks)](
        *(p, q, drafts, accept_coins, resample_coins, tokens, accept_lens, sums, counters(rows, p.device), *strides),
        *(accept_coins.stride(0), tokens.stride(0), gamma, rows, blocks, size),
        WIDTH=triton.next_power_of_2(gamma + 1),
        BLOCK=BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


_STRIDES = ("p_row", "p_step", "q_row", "q_step", "drafts_row", "coins_row", "tokens_row")
_SIZES = (*_STRIDES, "gamma", "rows", "blocks", "size")
_VERIFY = {"p": "*fp32", "q": "*fp32", "drafts": "*i64", "accept_coins": "*fp64", "resample_coins": "*fp64"}
_VERIFY |= {"tokens": "*i64", "accept_lens": "*i32", "sums": "*fp64", "arrived": "*i32"} | dict.fromkeys(_SIZES, "i32")
SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (_verify, _VERIFY, {"WIDTH": 2 * gamma, "BLOCK": BLOCK, "BLOCKS": 256}) for gamma in (1, 4, 8)
]
