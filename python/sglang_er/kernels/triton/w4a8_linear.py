"""out[M, N] = x^[M, K] @ W[N, K].T + bias[N], W int4, x^ = x rounded to int8 by row and group, fp32 accumulation.

Two launches. One makes levels of x, bit for bit the reference's, in the order of a packed group's bytes: those of low
nibbles, then those of high ones. A program of the other makes `BLOCK_N` outputs for a block of rows: nibbles are
operands after one mask or shift, products are exact integers, and for each group

    total += w_scale * x_scale * sum(level q) + w_zero * x_scale * sum(level)

Few outputs and many inputs: groups are split between programs, whose sums a third launch adds in order. The split and
the order depend on the weight's shape alone, so a row's result depends neither on other rows nor on their number.

Bound: the packed weight, read once for a block of rows, until products of int8 take longer. Accuracy: with x^ in the
place of x, at most 2**-19 * sum_k |x^_k| (15 scale + |zero|), plus rounding to the output's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.triton.rounding import round_to_int
from sglang_er.kernels.triton.w4a16_linear import add_splits

BLOCK_N = 64
CHUNK = 64  # bytes of a row that are operands at a time, 128 weights
_MULTIPROCESSORS = 132  # H100, H200; fixed, so that other GPUs split alike
_MIN_GROUPS = 4  # a shorter split saves less than the third launch costs


@triton.jit
def quantize_kernel(
    x: tl.tensor,
    levels: tl.tensor,
    numbers: tl.tensor,
    K: tl.tensor,
    x_stride: tl.tensor,
    groups: tl.tensor,
    GROUP: tl.constexpr,
) -> None:
    """Levels [M, groups, GROUP] int8 and (scale, scale * sum of levels) [M, groups, 2] fp32."""
    row = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    place = tl.arange(0, GROUP)
    # Bits 16 h + 4 i of word j are input i * GROUP/4 + 2 j + h.
    nibble, word, byte = place // (GROUP // 2), place % (GROUP // 2) // 4, place % 4
    k = group * GROUP + (2 * (byte % 2) + nibble) * (GROUP // 4) + 2 * word + byte // 2
    values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    top_bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    finite = top_bits < 0x7F800000
    top = tl.where(finite, top_bits, 0x3F800000).to(tl.float32, bitcast=True)
    top = tl.maximum(top, 7.70371977754894e-34)  # 2^-110
    scaled = values * tl.math.div_rn(127.0, top)
    level = round_to_int(tl.where(finite, scaled, 0.0)).to(tl.int32)
    scale = tl.where(finite, tl.math.div_rn(top, 127.0), float("nan"))
    at = row * groups + group
    tl.store(levels + at * GROUP + place, level.to(tl.int8))
    tl.store(numbers + at * 2, scale)
    tl.store(numbers + at * 2 + 1, scale * tl.sum(level, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["M", "split_stride"])
def linear_kernel(
    levels: tl.tensor,
    numbers: tl.tensor,
    packed: tl.tensor,
    scales_zeros: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    groups: tl.tensor,
    out_stride: tl.tensor,
    split_stride: tl.tensor,
    split_groups: tl.tensor,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    # Blocks of rows of one weight tile are neighbours in time.
    program = tl.program_id(0)
    row_blocks = tl.cdiv(M, BLOCK_M)
    m = (program % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    program = program // row_blocks
    split = program % SPLITS
    n = (program // SPLITS) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_live, n_live = m < M, n < tl.cdiv(N, 16) * 16
    byte = tl.arange(0, CHUNK)
    tile = (n // 16).to(tl.int64) * groups
    rows = m.to(tl.int64) * groups
    within = (n % 16)[:, None] * 4 + (byte // 4)[None, :] * 64 + (byte % 4)[None, :]

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in range(split * split_groups, tl.minimum((split + 1) * split_groups, groups)):
        product = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        words = packed + (tile + group)[:, None] * (GROUP * 8) + within
        inputs = levels + (rows + group)[None, :] * GROUP + byte[:, None]
        for first in tl.static_range(0, GROUP // 2, CHUNK):
            pairs = tl.load(words + first * 16, mask=n_live[:, None], other=0)
            low = tl.load(inputs + first, mask=m_live[None, :], other=0)
            high = tl.load(inputs + first + GROUP // 2, mask=m_live[None, :], other=0)
            product = tl.dot((pairs & 15).to(tl.int8), low, product, out_dtype=tl.int32)
            product = tl.dot((pairs >> 4).to(tl.int8), high, product, out_dtype=tl.int32)
        scale = tl.load(scales_zeros + (tile + group) * 32 + n % 16, mask=n_live, other=0.0).to(tl.float32)
        zero = tl.load(scales_zeros + (tile + group) * 32 + 16 + n % 16, mask=n_live, other=0.0).to(tl.float32)
        x_scale = tl.load(numbers + (rows + group) * 2, mask=m_live, other=0.0)
        x_sum = tl.load(numbers + (rows + group) * 2 + 1, mask=m_live, other=0.0)
        total = tl.fma(product.to(tl.float32) * scale[:, None], x_scale[None, :], total)
        total = tl.fma(zero[:, None], x_sum[None, :], total)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out + split * split_stride + m.to(tl.int64)[None, :] * out_stride + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & m_live[None, :])


def split_groups(out_features: int, in_features: int, group_size: int) -> tuple[int, int]:
    """(splits, groups of a split) for a weight, whatever x is."""
    groups = triton.cdiv(in_features, group_size)
    splits = max(1, min(_MULTIPROCESSORS // triton.cdiv(out_features, BLOCK_N), groups // _MIN_GROUPS))
    each = triton.cdiv(groups, splits)
    return triton.cdiv(groups, each), each


def row_block(rows: int) -> int:
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def compile_options(_: dict[str, str], constants: dict[str, Any], __: int = 0) -> dict[str, Any]:
    """Rounding of x takes no fused products."""
    linear = "BLOCK_M" in constants
    return {"num_warps": 4 if linear else 1, "num_stages": 4 if linear else 1, "enable_fp_fusion": linear}


def w4a8_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    rows, (outputs, inputs), group = x.shape[0], weight.shape, weight.group_size
    groups = triton.cdiv(inputs, group)
    levels = torch.empty(rows, groups, group, dtype=torch.int8, device=x.device)
    numbers = torch.empty(rows, groups, 2, dtype=torch.float32, device=x.device)
    sizes: dict[str, Any] = {"GROUP": group}
    quantize_kernel[(rows * groups,)](
        x, levels, numbers, inputs, x.stride(0), groups, **sizes, **compile_options({}, sizes)
    )
    splits, each = split_groups(outputs, inputs, group)
    sizes = _sizes(rows, group, splits, bias is not None and splits == 1)
    target = out if splits == 1 else torch.empty((splits, rows, outputs), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, sizes["BLOCK_M"]) * splits * triton.cdiv(outputs, BLOCK_N),)
    linear_kernel[grid](
        levels,
        numbers,
        weight.packed,
        weight.scales_zeros,
        bias,
        target,
        rows,
        outputs,
        groups,
        target.stride(-2),
        rows * outputs,
        each,
        **sizes,
        **compile_options({}, sizes),
    )
    if splits > 1:
        add_splits(target, bias, out)


def _sizes(rows: int, group: int, splits: int, has_bias: bool) -> dict[str, Any]:
    chunk = min(CHUNK, group // 2)
    blocks = {"CHUNK": chunk, "BLOCK_M": row_block(rows), "BLOCK_N": BLOCK_N}
    return {"GROUP": group, **blocks, "SPLITS": splits, "HAS_BIAS": has_bias}


_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def _quantize_spec(dtype: torch.dtype, group: int) -> tuple[Any, dict[str, str], dict[str, Any]]:
    signature = {"x": _NAMES[dtype], "levels": "*i8", "numbers": "*fp32", "K": "i32", "x_stride": "i32"}
    return quantize_kernel, signature | {"groups": "i32"}, {"GROUP": group}


def _linear_spec(dtype: torch.dtype, rows: int, group: int, splits: int) -> tuple[Any, dict[str, str], dict[str, Any]]:
    signature = {"levels": "*i8", "numbers": "*fp32", "packed": "*u8", "scales_zeros": "*bf16", "bias": _NAMES[dtype]}
    signature |= {"out": _NAMES[dtype] if splits == 1 else "*fp32"}
    signature |= dict.fromkeys(("M", "N", "groups", "out_stride", "split_stride", "split_groups"), "i32")
    return linear_kernel, signature, _sizes(rows, group, splits, splits == 1)


SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    *[_quantize_spec(dtype, group) for dtype in _NAMES for group in (64, 128)],
    *[_linear_spec(dtype, rows, 128, splits) for dtype in _NAMES for rows in (16, 32, 64) for splits in (1, 2)],
    *[_linear_spec(torch.bfloat16, rows, 64, 1) for rows in (16, 32, 64)],
]
