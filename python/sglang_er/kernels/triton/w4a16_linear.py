"""out[M, N] = x[M, K] @ W[N, K].T + bias[N], W int4, x bf16, fp16 or fp32, fp32 accumulation.

A program makes 32 outputs for a block of rows of x (`w4_tile.py` has the arithmetic and its accuracy). Few outputs and
many inputs: the steps are split between programs, whose sums a second launch adds in order. The split and the order
depend on the weight's shape alone, so a row's result depends neither on other rows nor on their number.

Bound: the packed weight is read once for each block of rows (8, 16 or 32; blocks of one weight tile run side by side
and share it in L2), so the goal is sustained read bandwidth; x is read again by every program, from L2.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.triton.w4_tile import INTERPRETED, SLOTS, chunk_words, steps_of, tile_product

BLOCK_N = 32  # smaller: x is read too often; larger: too few programs for N = 3584
REDUCE_BLOCK = 512
_MULTIPROCESSORS = 132  # H100, H200; fixed, so that other GPUs split alike
_MIN_STEPS = 2  # a shorter split saves less than the second launch costs


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    scales_zeros: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    split_stride: tl.tensor,
    steps: tl.tensor,
    GROUP: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    # Blocks of rows of one weight tile are neighbours in time.
    program = tl.program_id(0)
    row_blocks = tl.cdiv(M, BLOCK_M)
    m = (program % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    program = program // row_blocks
    split = program % SPLITS
    n = (program // SPLITS) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_live = m < M
    result = tile_product(
        x + m.to(tl.int64) * x_stride,
        m_live,
        packed,
        scales_zeros,
        n,
        n < tl.cdiv(N, 16) * 16,
        K,
        split * steps,
        (split + 1) * steps,
        GROUP,
        CHUNK_WORDS,
        BLOCK_M,
        BLOCK_N,
        SLOTS,
        UPCAST,
    )
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out + split * split_stride + m.to(tl.int64)[None, :] * out_stride + n[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=(n < N)[:, None] & m_live[None, :])


@triton.jit
def reduce_kernel(
    partial: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    out_stride: tl.tensor,
    split_stride: tl.tensor,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out[m] = sum over splits, in order, of partial[split, m], + bias."""
    tiles = tl.cdiv(N, BLOCK)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    result = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        result += tl.load(partial + split * split_stride + m * N + n, mask=live, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + m * out_stride + n, result.to(out.dtype.element_ty), mask=live)


def split_steps(out_features: int, in_features: int, group_size: int) -> tuple[int, int]:
    """(splits, steps of a split) for a weight, whatever x is."""
    steps = steps_of(in_features, group_size)
    tiles = triton.cdiv(out_features, BLOCK_N)
    splits = max(1, min(_MULTIPROCESSORS // tiles, steps // _MIN_STEPS))
    each = triton.cdiv(steps, splits)
    return triton.cdiv(steps, each), each


def row_block(rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_M, stages at most: `stages_within`).

    A tensor core adds in one order whatever the tile; the order of a plain fp32 product is the compiler's choice for
    each tile, so fp32 has one.
    """
    if dtype == torch.float32:
        return 16, 3
    if rows <= 8:
        return 8, 4
    return (16, 3) if rows <= 16 else (32, 3)


def stages_within(limit: int, most: int, block_m: int, group_size: int, itemsize: int) -> int:
    """How many stages, of `most`, a program with `limit` bytes of shared memory has room for. All but one of them have
    a buffer of up to 16 KiB of weight and 64 KiB of x; plain fp32 products lay their operands out anew beside it."""
    words = chunk_words(group_size)
    buffer = SLOTS * words * (4 * BLOCK_N + 8 * itemsize * block_m)
    beside = 32768 if itemsize == 4 else 1024
    return max(1, min(most, 1 + (limit - beside) // buffer))


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Of shared memory that a program may have there; what interprets kernels has none and needs none."""
    if device.type != "cuda":
        return 1 << 20
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def compile_options(signature: dict[str, str], constants: dict[str, Any], shared: int) -> dict[str, Any]:
    """As launches have them on a GPU with `shared` bytes; those of fewer steps than stages may take less."""
    if "BLOCK_M" not in constants:
        return {}
    dtype = next(dtype for dtype, name in _NAMES.items() if signature["x"] == f"*{name}")
    block_m, most = row_block(constants["BLOCK_M"], dtype)
    return {"num_warps": SLOTS, "num_stages": stages_within(shared, most, block_m, constants["GROUP"], dtype.itemsize)}


def w4a16_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    rows, (outputs, inputs) = x.shape[0], weight.shape
    splits, steps = split_steps(outputs, inputs, weight.group_size)
    block_m, most = row_block(rows, x.dtype)
    split_stride = rows * outputs
    target = out if splits == 1 else torch.empty((splits, rows, outputs), dtype=torch.float32, device=x.device)
    words = weight.packed.view(torch.int32)
    grid = (triton.cdiv(rows, block_m) * splits * triton.cdiv(outputs, BLOCK_N),)
    linear_kernel[grid](
        x,
        words,
        weight.scales_zeros,
        bias,
        target,
        rows,
        outputs,
        inputs,
        x.stride(0),
        target.stride(-2),
        split_stride,
        steps,
        GROUP=weight.group_size,
        CHUNK_WORDS=chunk_words(weight.group_size),
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        SLOTS=SLOTS,
        SPLITS=splits,
        HAS_BIAS=bias is not None and splits == 1,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
        num_warps=SLOTS,
        num_stages=stages_within(shared_bytes(x.device), most, block_m, weight.group_size, x.itemsize),
        enable_fp_fusion=True,
    )
    if splits > 1:
        add_splits(target, bias, out)


def add_splits(partial: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out[M, N] = partial[splits, M, N] (fp32) added up in order, + bias."""
    splits, rows, outputs = partial.shape
    reduce_kernel[(rows * triton.cdiv(outputs, REDUCE_BLOCK),)](
        partial,
        bias,
        out,
        outputs,
        out.stride(0),
        partial.stride(0),
        SPLITS=splits,
        HAS_BIAS=bias is not None,
        BLOCK=REDUCE_BLOCK,
        enable_fp_fusion=True,
    )


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_SIZES = ("M", "N", "K", "x_stride", "out_stride", "split_stride", "steps")


def _linear_spec(dtype: torch.dtype, rows: int, group_size: int, splits: int) -> tuple[Any, dict[str, str], dict]:
    element = f"*{_NAMES[dtype]}"
    signature = {"x": element, "packed": "*i32", "scales_zeros": "*bf16", "bias": element}
    signature |= {"out": element if splits == 1 else "*fp32", **dict.fromkeys(_SIZES, "i32")}
    constants = {"GROUP": group_size, "CHUNK_WORDS": chunk_words(group_size), "BLOCK_M": row_block(rows, dtype)[0]}
    constants |= {"BLOCK_N": BLOCK_N, "SLOTS": SLOTS, "SPLITS": splits, "HAS_BIAS": splits == 1, "UPCAST": False}
    return linear_kernel, signature, constants


def _reduce_spec(dtype: torch.dtype) -> tuple[Any, dict[str, str], dict[str, Any]]:
    element = f"*{_NAMES[dtype]}"
    signature = {"partial": "*fp32", "bias": element, "out": element}
    signature |= {"N": "i32", "out_stride": "i32", "split_stride": "i32"}
    return reduce_kernel, signature, {"SPLITS": 2, "HAS_BIAS": True, "BLOCK": REDUCE_BLOCK}


SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    *[_linear_spec(dtype, rows, 128, splits) for dtype in _NAMES for rows in (1, 16, 32) for splits in (1, 2)],
    *[_linear_spec(torch.bfloat16, 1, group_size, 1) for group_size in (32, 64, 96, 1024)],
    *[_reduce_spec(dtype) for dtype in _NAMES],
]
