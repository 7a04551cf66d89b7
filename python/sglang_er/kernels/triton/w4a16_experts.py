"""out[t] = sum_c weights[t, c] (silu(gate) * up) @ down[e].T, (gate, up) = x[t] @ gate_up[e].T, e = experts[t, c].

Four launches of fixed grids; nothing is read on the host, so a CUDA graph holds them. A pair is a token and one of its
choices, number t * k + c.

1. `plan_kernel`, one program: a histogram of the pairs by expert, offsets by cumulative sums, the pairs in the order of
   their experts, and a table of blocks: an expert and up to BLOCK_M of its pairs. There are never more blocks than
   `most_blocks` says; what is left of the table says -1, and programs of those blocks return at once.
2. `product_kernel`, gated: 16 rows of gate and the same 16 of up for the pairs of a block (`w4_tile.py`), then
   silu(gate) * up, rounded to x's dtype as the next product's operand.
3. `product_kernel` with down, fp32.
4. `combine_kernel`: the weighted sum of a token's choices in their order.

Bound: the packed bytes of the experts that a pair names. Each is read once for a block of pairs; the blocks of one
expert are neighbours in time and share it in L2.

A row's result does not depend on the other rows: where a pair lies in its block is left to chance (atomics), but a
product's columns do not see each other, and no sum depends on a block's size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.triton.rounding import store_rounded
from sglang_er.kernels.triton.w4_tile import INTERPRETED, SLOTS, chunk_words, steps_of, tile_product
from sglang_er.kernels.triton.w4a16_linear import BLOCK_N, row_block, shared_bytes, stages_within
from sglang_er.kernels.triton.w4a16_linear import compile_options as linear_options

COMBINE_BLOCK = 512
_MOST_PAIRS = 1024  # of a step of the plan
_PLAN_WARPS = 4
_ALIGNED = 4  # integers: 16 bytes, which kernels are compiled for


@triton.jit(do_not_specialize=["pairs", "most_blocks"], do_not_specialize_on_alignment=["experts"])
def plan_kernel(
    experts: tl.tensor,
    cursors: tl.tensor,
    order: tl.tensor,
    blocks: tl.tensor,
    pairs: tl.tensor,
    choices: tl.tensor,
    experts_stride: tl.tensor,
    count: tl.tensor,
    most_blocks: tl.tensor,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLE: tl.constexpr,
) -> None:
    """blocks [3, most_blocks]: expert or -1, and from where to where in `order` its pairs are."""
    expert = tl.arange(0, BINS)
    size = tl.zeros((BINS,), tl.int32)
    for first in range(0, pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        at = experts + (pair // choices) * experts_stride + pair % choices
        chosen = tl.load(at, mask=pair < pairs, other=-1).to(tl.int32)
        size += tl.histogram(chosen, BINS, mask=(chosen >= 0) & (chosen < count))
    begin = tl.cumsum(size, 0) - size
    end = begin + size
    width = (size + BLOCK_M - 1) // BLOCK_M
    first_block = tl.cumsum(width, 0) - width
    tl.store(cursors + expert, begin)

    for first in range(0, most_blocks, TABLE):
        block = first + tl.arange(0, TABLE)
        within = block[:, None] - first_block[None, :]
        owner = (within >= 0) & (within < width[None, :])
        from_row = begin[None, :] + within * BLOCK_M
        to_row = tl.minimum(from_row + BLOCK_M, end[None, :])
        inside = block < most_blocks
        tl.store(blocks + block, tl.max(tl.where(owner, expert[None, :], -1), axis=1), mask=inside)
        tl.store(blocks + most_blocks + block, tl.sum(tl.where(owner, from_row, 0), axis=1), mask=inside)
        tl.store(blocks + 2 * most_blocks + block, tl.sum(tl.where(owner, to_row, 0), axis=1), mask=inside)

    tl.debug_barrier()  # cursors are written by other threads than those that count them up
    for first in range(0, pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        at = experts + (pair // choices) * experts_stride + pair % choices
        chosen = tl.load(at, mask=pair < pairs, other=-1).to(tl.int32)
        live = (chosen >= 0) & (chosen < count)
        place = tl.atomic_add(cursors + chosen, 1, mask=live, sem="relaxed")
        tl.store(order + place, pair, mask=live)


@triton.jit(do_not_specialize=["most_blocks"])
def product_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    scales_zeros: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    blocks: tl.tensor,
    most_blocks: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    choices: tl.tensor,
    steps: tl.tensor,
    GROUP: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    GATED: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """out[pair] = x[pair // choices] @ W[expert].T, W[expert] [N, K]; gated: silu(first half) * second half."""
    block, tile = tl.program_id(0) % most_blocks, tl.program_id(0) // most_blocks
    expert = tl.load(blocks + block).to(tl.int64)
    if expert < 0:
        return
    m = tl.load(blocks + most_blocks + block) + tl.arange(0, BLOCK_M)
    m_live = m < tl.load(blocks + 2 * most_blocks + block)
    pair = tl.load(order + m, mask=m_live, other=0)
    row = tl.arange(0, BLOCK_N)
    if GATED:
        inner = tile * (BLOCK_N // 2) + row % (BLOCK_N // 2)
        n = inner + (row // (BLOCK_N // 2)) * (N // 2)
        n_live = inner < N // 2
    else:
        n = tile * BLOCK_N + row
        n_live = n < N
    before = expert * (N // 16) * tl.cdiv(K, GROUP)  # blocks of 16 rows, and their groups
    result = tile_product(
        x + (pair // choices).to(tl.int64) * x_stride,
        m_live,
        packed + before * (GROUP // 8 * 16),
        scales_zeros + before * 32,
        n,
        n_live,
        K,
        0,
        steps,
        GROUP,
        CHUNK_WORDS,
        BLOCK_M,
        BLOCK_N,
        SLOTS,
        EMULATED and x.dtype.element_ty == tl.bfloat16,
    )
    to_row = out + pair.to(tl.int64)[None, :] * out_stride
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(result, (2, BLOCK_N // 2, BLOCK_M)), (1, 2, 0)))
        at = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        mask = (at < N // 2)[:, None] & m_live[None, :]
        store_rounded(to_row + at[:, None], gate * tl.sigmoid(gate) * up, mask, EMULATED)
    else:
        tl.store(to_row + n[:, None], result, mask=n_live[:, None] & m_live[None, :])


@triton.jit(do_not_specialize_on_alignment=["experts", "weights"])
def combine_kernel(
    results: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    choices: tl.tensor,
    count: tl.tensor,
    experts_stride: tl.tensor,
    weights_stride: tl.tensor,
    out_stride: tl.tensor,
    BLOCK: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """out[t] = sum over c, in order, of weights[t, c] * results[t * k + c]."""
    tiles = tl.cdiv(N, BLOCK)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(choices):
        expert = tl.load(experts + token * experts_stride + choice)
        weight = tl.load(weights + token * weights_stride + choice).to(tl.float32)
        written = tl.where((expert >= 0) & (expert < count), N, 0)  # of another rank's there is nothing
        result = tl.load(results + (token * choices + choice) * N + n, mask=n < written, other=0.0)
        total += tl.where(n < written, weight * result, 0.0)
    store_rounded(out + token * out_stride + n, total, n < N, EMULATED)


def most_blocks(pairs: int, count: int, block_m: int) -> int:
    """Blocks there can be at most: each of an expert's is full but for its last one, and none is empty."""
    return min(pairs, (pairs + count * (block_m - 1)) // block_m)


def block_of(pairs: int, count: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_M, stages at most): room for twice the mean of an expert, as few have more."""
    return row_block(triton.cdiv(2 * pairs, count), dtype)


def plan_constants(pairs: int, count: int, block_m: int) -> dict[str, int]:
    bins = max(32, triton.next_power_of_2(count))
    chunk = min(_MOST_PAIRS, max(32, triton.next_power_of_2(pairs)))
    return {"BLOCK_M": block_m, "BINS": bins, "CHUNK": chunk, "TABLE": max(4, 4096 // bins)}


def w4a16_experts(
    x: torch.Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    experts: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    (tokens, outputs), choices, inner = x.shape, experts.shape[1], down.in_features
    pairs, count = tokens * choices, down.out_features // outputs
    block_m, most = block_of(pairs, count, x.dtype)
    grid_blocks = most_blocks(pairs, count, block_m)
    plan = plan_constants(pairs, count, block_m)
    parts = plan["BINS"], triton.cdiv(pairs, _ALIGNED) * _ALIGNED, 3 * grid_blocks
    cursors, order, blocks = torch.empty(sum(parts), dtype=torch.int32, device=x.device).split(parts)
    plan_kernel[(1,)](
        *(experts, cursors, order, blocks, pairs, choices, experts.stride(0), count, grid_blocks),
        **plan,
        num_warps=_PLAN_WARPS,
        enable_fp_fusion=True,
    )
    room = shared_bytes(x.device)
    hidden = torch.empty((pairs, inner), dtype=x.dtype, device=x.device)
    results = torch.empty((pairs, outputs), dtype=torch.float32, device=x.device)
    for source, weight, target, rows, of in (
        (x, gate_up, hidden, 2 * inner, choices),
        (hidden, down, results, outputs, 1),
    ):
        steps = steps_of(weight.in_features, weight.group_size)
        product_kernel[(grid_blocks * triton.cdiv(rows, BLOCK_N),)](
            *(source, weight.packed.view(torch.int32), weight.scales_zeros, target, order, blocks, grid_blocks),
            *(rows, weight.in_features, source.stride(0), target.stride(0), of, steps),
            GROUP=weight.group_size,
            CHUNK_WORDS=chunk_words(weight.group_size),
            BLOCK_M=block_m,
            BLOCK_N=BLOCK_N,
            SLOTS=SLOTS,
            GATED=target is hidden,
            EMULATED=INTERPRETED,
            num_warps=SLOTS,
            num_stages=min(steps + 1, stages_within(room, most, block_m, weight.group_size, x.itemsize)),
            enable_fp_fusion=True,
        )
    combine_kernel[(tokens * triton.cdiv(outputs, COMBINE_BLOCK),)](
        *(results, experts, weights, out, outputs, choices, count),
        *(experts.stride(0), weights.stride(0), out.stride(0)),
        BLOCK=COMBINE_BLOCK,
        EMULATED=INTERPRETED,
        enable_fp_fusion=True,
    )


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _plan_spec(tokens: int, index: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    sizes = ("pairs", "choices", "experts_stride", "count", "most_blocks")
    signature = {"experts": f"*{index}", **dict.fromkeys(("cursors", "order", "blocks"), "*i32")}
    return plan_kernel, signature | dict.fromkeys(sizes, "i32"), plan_constants(8 * tokens, 128, 8)


def _product_spec(dtype: torch.dtype, tokens: int, group: int, gated: bool) -> tuple[Any, dict[str, str], dict]:
    element = f"*{_NAMES[dtype]}"
    signature = {"x": element, "packed": "*i32", "scales_zeros": "*bf16", "out": element if gated else "*fp32"}
    signature |= {"order": "*i32", "blocks": "*i32"}
    sizes = ("most_blocks", "N", "K", "x_stride", "out_stride", "choices", "steps")
    constants = {"GROUP": group, "CHUNK_WORDS": chunk_words(group), "BLOCK_M": block_of(8 * tokens, 128, dtype)[0]}
    constants |= {"BLOCK_N": BLOCK_N, "SLOTS": SLOTS, "GATED": gated, "EMULATED": False}
    return product_kernel, signature | dict.fromkeys(sizes, "i32"), constants


def _combine_spec(dtype: torch.dtype) -> tuple[Any, dict[str, str], dict[str, Any]]:
    element = f"*{_NAMES[dtype]}"
    signature = {"results": "*fp32", "experts": "*i32", "weights": "*fp32", "out": element}
    sizes = ("N", "choices", "count", "experts_stride", "weights_stride", "out_stride")
    return combine_kernel, signature | dict.fromkeys(sizes, "i32"), {"BLOCK": COMBINE_BLOCK, "EMULATED": False}


def compile_options(signature: dict[str, str], constants: dict[str, Any], shared: int) -> dict[str, Any]:
    """As launches have them on a GPU with `shared` bytes of shared memory a program."""
    return linear_options(signature, constants, shared) if "GATED" in constants else {"num_warps": _PLAN_WARPS}


SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    *[_plan_spec(tokens, index) for tokens in (1, 128) for index in ("i32", "i64")],
    *[_product_spec(dtype, tokens, 128, gated) for dtype in _NAMES for tokens in (1, 128) for gated in (True, False)],
    _product_spec(torch.bfloat16, 512, 128, True),
    *[_product_spec(torch.bfloat16, 1, group, True) for group in (32, 64, 96, 1024)],
    *[_combine_spec(dtype) for dtype in _NAMES],
]
