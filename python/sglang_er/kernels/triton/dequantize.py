"""fp32 W[N, K] = q * scale + zero of a packed weight, rounded once: bit for bit the reference's result.

Layout: csrc/include/sglang_er/packed_weight.h. A program makes 16 rows of neighbouring groups, about 256 inputs. It
reads whole lines of words; bits 4i and 16 + 4i of a word are neighbours, and neighbouring words continue the row, so
a nibble position is a quarter of the group, written along K.

Bound: half a byte is read and four are written for a weight, at the bandwidth of a copy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.base import PackedWeight

TILE_INPUTS = 256  # 16 KiB of fp32 a program


@triton.jit
def _fp32(bits):
    """From the bits of a bf16; the interpreter converts denormal bf16 wrongly."""
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def unpack_kernel(
    packed: tl.tensor,
    scales_zeros: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    groups: tl.tensor,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_WORDS: tl.constexpr,  # GROUP / 8 rounded up to a power of two
) -> None:
    WORDS: tl.constexpr = GROUP // 8
    tiles = tl.cdiv(groups, TILE_GROUPS)
    block = tl.program_id(0) // tiles
    group = (tl.program_id(0) % tiles) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    lane = tl.arange(0, 16)
    group_live = group < groups
    index = block.to(tl.int64) * groups + group

    # [lane, group, word]
    word = tl.arange(0, TILE_WORDS)[None, None, :]
    words = tl.load(
        packed + index[None, :, None] * (WORDS * 16) + word * 16 + lane[:, None, None],
        mask=group_live[None, :, None] & (word < WORDS),
        other=0,
    )
    meta = scales_zeros + index[None, :] * 32 + lane[:, None]
    scale = _fp32(tl.load(meta, mask=group_live[None, :], other=0))[:, :, None]
    zero = _fp32(tl.load(meta + 16, mask=group_live[None, :], other=0))[:, :, None]

    column = tl.arange(0, 2 * TILE_WORDS)[None, None, :]
    row = block * 16 + lane
    rows = out + row.to(tl.int64)[:, None, None] * stride
    for position in tl.static_range(4):
        low = (words >> (4 * position)) & 15
        high = (words >> (16 + 4 * position)) & 15
        levels = tl.interleave(low, high).to(tl.float32)
        k = group[None, :, None] * GROUP + position * (GROUP // 4) + column
        live = (row < N)[:, None, None] & (column < GROUP // 4) & (k < K)
        tl.store(rows + k, tl.fma(levels, scale, zero), mask=live)


def constants(group_size: int) -> dict[str, int]:
    words = triton.next_power_of_2(group_size // 8)
    return {"GROUP": group_size, "TILE_GROUPS": max(1, TILE_INPUTS // (8 * words)), "TILE_WORDS": words}


def dequantize(weight: PackedWeight, out: torch.Tensor) -> None:
    blocks, groups = weight.packed.shape[:2]
    sizes = constants(weight.group_size)
    unpack_kernel[(blocks * triton.cdiv(groups, sizes["TILE_GROUPS"]),)](
        weight.packed.view(torch.int32),
        weight.scales_zeros.view(torch.int16),
        out,
        weight.out_features,
        weight.in_features,
        out.stride(0),
        groups,
        **sizes,
        num_warps=4,
        enable_fp_fusion=True,
    )


_ARGUMENTS = {
    "packed": "*i32",
    "scales_zeros": "*i16",
    "out": "*fp32",
    **dict.fromkeys(("N", "K", "stride", "groups"), "i32"),
}
SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (unpack_kernel, _ARGUMENTS, constants(group_size)) for group_size in (32, 64, 96, 128, 1024)
]
