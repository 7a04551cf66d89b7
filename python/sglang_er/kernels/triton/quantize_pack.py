"""W[N, K] bf16, fp16 or fp32 to int4, asymmetric, round to nearest: bit for bit the reference's result.

Layout: csrc/include/sglang_er/packed_weight.h. A program takes the 16 rows of a block and neighbouring groups, about
256 inputs, as four tiles: quarter i of the groups holds the nibbles at bits 4i of the half words, so four levels join
by shifts and two neighbours by one more. Rows are read along K in pieces of 16 bytes, words written in whole lines.

Bound: every weight is read once and every packed byte written once, at the bandwidth of a copy.

Scale and zero are rounded to bf16 with integers, levels by adding 2**23: the same bits on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.triton.clip_search import (
    CANDIDATES,
    bf16_scale,
    bf16_zero,
    candidate,
    squares,
    units,
    within,
)

TILE_INPUTS = 256  # 8 KiB of bf16 a program: enough programs in flight to hide memory latency


@triton.jit
def _load(at, live):
    """As fp32. Bits of bf16 are moved, not converted: the interpreter gets denormal bf16 wrong."""
    if at.dtype.element_ty == tl.int16:
        return (tl.load(at, mask=live, other=0).to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(
            tl.float32, bitcast=True
        )
    else:
        return tl.load(at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _bf16_bits(value):
    return (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)


@triton.jit
def _level_bits(
    values: tl.tensor, zero: tl.tensor, inverse_scale: tl.tensor, live: tl.tensor, SHIFT: tl.constexpr
) -> tl.tensor:
    """Levels 0..15, NaN is 0, shifted left; the low bits of 2**23 + x are x rounded to the nearest, ties to even."""
    level = (values - zero) * inverse_scale
    level = tl.minimum(tl.where(level > 0, level, 0.0), 15.0)
    bits = (level + 8388608.0).to(tl.uint32, bitcast=True) & 15
    return tl.where(live, bits << SHIFT, 0)


@triton.jit
def pack_kernel(
    weight: tl.tensor,
    packed: tl.tensor,
    scales_zeros: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    groups: tl.tensor,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    QUARTER: tl.constexpr,  # GROUP / 4 rounded up to a power of two
    CLIP_SEARCH: tl.constexpr,
) -> None:
    tiles = tl.cdiv(groups, TILE_GROUPS)
    block = tl.program_id(0) // tiles
    group = (tl.program_id(0) % tiles) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    lane = tl.arange(0, 16)
    row_live = block * 16 + lane < N
    rows = weight + (block * 16 + lane).to(tl.int64) * stride

    # [lane, group, input of the quarter]
    column = tl.arange(0, QUARTER)[None, None, :]
    k0 = group[None, :, None] * GROUP + column
    k1, k2, k3 = k0 + GROUP // 4, k0 + GROUP // 2, k0 + 3 * GROUP // 4
    inside = column < GROUP // 4
    live0, live1, live2, live3 = inside & (k0 < K), inside & (k1 < K), inside & (k2 < K), inside & (k3 < K)
    at, here = rows[:, None, None], row_live[:, None, None]
    w0 = _load(at + k0, here & live0)
    w1 = _load(at + k1, here & live1)
    w2 = _load(at + k2, here & live2)
    w3 = _load(at + k3, here & live3)

    inf = float("inf")
    low = tl.minimum(
        tl.minimum(tl.where(live0, w0, inf), tl.where(live1, w1, inf)),
        tl.minimum(tl.where(live2, w2, inf), tl.where(live3, w3, inf)),
    )
    high = tl.maximum(
        tl.maximum(tl.where(live0, w0, -inf), tl.where(live1, w1, -inf)),
        tl.maximum(tl.where(live2, w2, -inf), tl.where(live3, w3, -inf)),
    )
    # Groups past the end of the tile have no weights: zeros keep their arithmetic finite.
    low = tl.where(group[None, :] < groups, tl.min(low, axis=2), 0.0)
    high = tl.where(group[None, :] < groups, tl.max(high, axis=2), 0.0)

    low = tl.where(low == 0, 0.0, low)  # of either sign; a negative one that rounds to zero keeps its sign
    step = tl.math.div_rn(high, 15.0) - tl.math.div_rn(low, 15.0)
    scale, zero = bf16_scale(step), bf16_zero(low)
    if CLIP_SEARCH:
        whole, whole_zero = scale, zero
        whole_inverse = tl.math.div_rn(1.0, whole)
        base, factor = whole_zero[:, :, None], whole_inverse[:, :, None]
        v0, v1 = units(w0, base, factor), units(w1, base, factor)
        v2, v3 = units(w2, base, factor), units(w3, base, factor)
        lowest, highest = units(low, whole_zero, whole_inverse), units(high, whole_zero, whole_inverse)
        least = tl.full((16, TILE_GROUPS), 0x7FFFFFFF, tl.int32)
        allowed = lowest == lowest
        for index in range(CANDIDATES):  # unrolled it would take all registers
            made, made_zero, z, s, m = candidate(low, whole, whole_zero, whole_inverse, index)
            total = squares(v0, live0, z, s, m) + squares(v1, live1, z, s, m)
            total += squares(v2, live2, z, s, m) + squares(v3, live3, z, s, m)
            fits = within(lowest, highest, z, s)
            allowed = tl.where(index == 0, fits, allowed)
            better = allowed & fits & (total < least)
            least = tl.where(better, total, least)
            scale, zero = tl.where(better, made, scale), tl.where(better, made_zero, zero)
    inverse = tl.math.div_rn(1.0, scale)[:, :, None]
    base = zero[:, :, None]

    halves = _level_bits(w0, base, inverse, live0, 0) | _level_bits(w1, base, inverse, live1, 4)
    halves |= _level_bits(w2, base, inverse, live2, 8) | _level_bits(w3, base, inverse, live3, 12)
    even, odd = tl.split(tl.reshape(halves, (16, TILE_GROUPS, QUARTER // 2, 2)))
    words = even | (odd << 16)

    WORDS: tl.constexpr = GROUP // 8
    word = tl.arange(0, QUARTER // 2)[None, None, :]
    group_live = group < groups
    index = block.to(tl.int64) * groups + group
    tl.store(
        packed + index[None, :, None] * (WORDS * 16) + word * 16 + lane[:, None, None],
        words.to(tl.int32, bitcast=True),
        mask=group_live[None, :, None] & (word < WORDS),
    )
    meta = scales_zeros + index[None, :] * 32 + lane[:, None]
    tl.store(meta, tl.where(row_live[:, None], _bf16_bits(scale), 0).to(tl.int16), mask=group_live[None, :])
    tl.store(meta + 16, tl.where(row_live[:, None], _bf16_bits(zero), 0).to(tl.int16), mask=group_live[None, :])


def constants(group_size: int, clip_search: bool) -> dict[str, int | bool]:
    quarter = triton.next_power_of_2(group_size // 4)
    tile = {"GROUP": group_size, "TILE_GROUPS": max(1, TILE_INPUTS // (4 * quarter)), "QUARTER": quarter}
    return {**tile, "CLIP_SEARCH": clip_search}


def compile_options(_: dict[str, str], constexprs: dict[str, Any], __: int = 0) -> dict[str, Any]:
    """Warps, so that a thread holds at most 64 weights; half as many while it also holds their units."""
    many = constexprs["GROUP"] > 512
    return {"num_warps": (16 if constexprs["CLIP_SEARCH"] else 8) if many else 4, "enable_fp_fusion": False}


def quantize_pack(weight: torch.Tensor, clip_search: bool, out: PackedWeight) -> None:
    blocks, groups = out.packed.shape[:2]
    sizes = constants(out.group_size, clip_search)
    weight = weight.detach()
    pack_kernel[(blocks * triton.cdiv(groups, sizes["TILE_GROUPS"]),)](
        weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight,
        out.packed.view(torch.int32),
        out.scales_zeros.view(torch.int16),
        out.out_features,
        out.in_features,
        weight.stride(0),
        groups,
        **sizes,
        **compile_options({}, sizes),
    )


_ARGUMENTS = {"packed": "*i32", "scales_zeros": "*i16", "N": "i32", "K": "i32", "stride": "i32", "groups": "i32"}
SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (pack_kernel, {"weight": weight, **_ARGUMENTS}, constants(group_size, clip_search))
    for weight in ("*i16", "*fp16", "*fp32")  # bf16 comes as its bits
    for group_size in (32, 64, 96, 128, 1024)
    for clip_search in (False, True)
]
