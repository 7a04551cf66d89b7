"""What both kernels of paged attention need to find a token's request, and the kernel that merges its lanes."""

# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_er.kernels.triton.rounding import emulated, store_rounded


def merge_lanes(
    sums: torch.Tensor,
    stats: torch.Tensor,
    query_begin: torch.Tensor,
    context_lens: torch.Tensor,
    requests: int,
    first_token: int,
    tokens: int,
    window: int,
    split: int,
    out: torch.Tensor,
) -> None:
    """``out`` of ``tokens`` tokens from their lanes.

    ``sums[token, head, lane, value_dim]`` and the sums of weights ``stats[1]`` are relative to the lane's largest score
    ``stats[0]``.
    """
    _, heads, lanes, value_dim = sums.shape
    merge_kernel[(tokens, heads)](
        sums,
        stats[0],
        stats[1],
        query_begin,
        context_lens,
        out,
        requests,
        first_token,
        window,
        out.stride(0),
        HEADS=heads,
        VALUE_DIM=value_dim,
        SPLIT=split,
        LANES=lanes,
        LANE_ROWS=triton.next_power_of_2(lanes),
        COLS=triton.next_power_of_2(value_dim),
        EMULATED=emulated(),
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
def find_request(query_begin, requests, token):
    """The request that owns ``token``: the last one that begins at or before it (those without tokens come earlier).

    Counted rather than searched: one load and one sum instead of a chain of loads.
    """
    count = 0
    for first in range(0, requests, 256):
        index = first + tl.arange(0, 256)
        begin = tl.load(query_begin + index, mask=index < requests, other=9223372036854775807)
        count += tl.sum((begin <= token).to(tl.int32))
    return count - 1


@triton.jit
def seen_range(query_begin, context_lens, request, token, window):
    """``begin``, ``end`` of the positions that the token sees, and the length of the context."""
    context = tl.load(context_lens + request).to(tl.int32)
    behind = tl.load(query_begin + request + 1).to(tl.int32) - token
    end = context - behind + 1
    begin = tl.where(window < 0, 0, tl.maximum(end - 1 - window, 0))
    return begin, end, context


@triton.jit
def first_split(lane, begin, SPLIT: tl.constexpr, LANES: tl.constexpr):
    """The first split at or behind that of position ``begin`` that belongs to the lane."""
    split = begin // SPLIT
    return split + (lane + LANES - split % LANES) % LANES


@triton.jit(do_not_specialize=["requests", "first_token"])
def merge_kernel(
    sums,
    maxima,
    totals,
    query_begin,
    context_lens,
    out,
    requests,
    first_token,
    window,
    out_stride,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    LANE_ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EMULATED: tl.constexpr,
):
    local = tl.program_id(0)
    head = tl.program_id(1)
    token = first_token + local
    request = find_request(query_begin, requests, token)
    begin, end, _ = seen_range(query_begin, context_lens, request, token, window)
    lane = tl.arange(0, LANE_ROWS)
    used = (lane < LANES) & (first_split(lane, begin, SPLIT, LANES) * SPLIT < end)
    at = (local.to(tl.int64) * HEADS + head) * LANES + lane
    maximum = tl.load(maxima + at, mask=used, other=float("-inf"))
    weight = tl.exp2(maximum - tl.max(maximum, 0))
    total = tl.sum(weight * tl.load(totals + at, mask=used, other=0.0), 0)
    column = tl.arange(0, COLS)
    mask = used[:, None] & (column < VALUE_DIM)[None, :]
    lanes = tl.load(sums + (at * VALUE_DIM)[:, None] + column[None, :], mask=mask, other=0.0)
    result = tl.sum(weight[:, None] * lanes, 0) / total
    pointers = out + token.to(tl.int64) * out_stride + head * VALUE_DIM + column
    store_rounded(pointers, result, column < VALUE_DIM, EMULATED)
