"""Steps of paged attention over one block of keys, all in fp32 but the operands of the tensor cores."""

# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from sglang_er.kernels.triton.fp8 import converted_fp8, fp8_operand
from sglang_er.kernels.triton.rounding import to_operand


@triton.jit
def pool_scores(query, keys, slots, mask, stride, HEAD_DIM: tl.constexpr, COLS: tl.constexpr):
    """``query[rows, COLS] . keys`` of the slots; masked ones are not read and score 0."""
    dims = tl.arange(0, COLS)
    pointers = keys + (slots * stride)[None, :] + dims[:, None]
    block = tl.load(pointers, mask=mask[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    return tl.dot(query, block.to(query.dtype), input_precision="ieee")


@triton.jit
def add_pool(
    first_sum, second_sum, weights, values, slots, mask, stride, first_dims, second_dims, VALUE_DIM: tl.constexpr
):
    """Adds ``weights[rows, keys] @ values`` to the two halves of the dimensions."""
    rows = values + (slots * stride)[:, None]
    block = tl.load(rows + first_dims[None, :], mask=mask[:, None] & (first_dims < VALUE_DIM)[None, :], other=0.0)
    first_sum = tl.dot(weights, block.to(weights.dtype), first_sum, input_precision="ieee")
    block = tl.load(rows + second_dims[None, :], mask=mask[:, None] & (second_dims < VALUE_DIM)[None, :], other=0.0)
    second_sum = tl.dot(weights, block.to(weights.dtype), second_sum, input_precision="ieee")
    return first_sum, second_sum


@triton.jit
def shadow_scores(
    first_query,
    second_query,
    query_sum,
    levels,
    rows,
    mask,
    HEAD_DIM: tl.constexpr,
    COLS: tl.constexpr,
    FORMAT: tl.constexpr,
    KEY_TYPE: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """``query . levels`` of the (slot, head) rows, without scales."""
    LEVELS: tl.constexpr = 2 if FORMAT == "int4" else 1  # a byte
    SIZE: tl.constexpr = HEAD_DIM // LEVELS
    at = tl.arange(0, COLS // LEVELS)
    pointers = levels + (rows * SIZE)[None, :] + at[:, None]
    block = tl.load(pointers, mask=mask[None, :] & (at < SIZE)[:, None], other=0)
    if FORMAT != "int4":
        scores = tl.dot(first_query, byte_operand(block, FORMAT, KEY_TYPE, EMULATED), input_precision="ieee")
    else:
        even, odd = int4_operands(block, KEY_TYPE, EMULATED)
        scores = tl.dot(first_query, even, input_precision="ieee")
        scores = tl.dot(second_query, odd, scores, input_precision="ieee")
        scores -= query_sum[:, None] * int4_offset(KEY_TYPE)
    return scores


@triton.jit
def add_shadow(
    first_sum,
    second_sum,
    weights,
    levels,
    rows,
    mask,
    VALUE_DIM: tl.constexpr,
    COLS: tl.constexpr,
    FORMAT: tl.constexpr,
    VALUE_TYPE: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Adds ``weights @ levels`` to the two halves; int4 levels count ``int4_offset`` too much."""
    SIZE: tl.constexpr = VALUE_DIM // 2 if FORMAT == "int4" else VALUE_DIM
    at = tl.arange(0, COLS // 2)
    pointers = levels + (rows * SIZE)[:, None] + at[None, :]
    block = tl.load(pointers, mask=mask[:, None] & (at < SIZE)[None, :], other=0)
    if FORMAT != "int4":
        first = byte_operand(block, FORMAT, VALUE_TYPE, EMULATED)
        block = tl.load(pointers + COLS // 2, mask=mask[:, None] & (at + COLS // 2 < SIZE)[None, :], other=0)
        second = byte_operand(block, FORMAT, VALUE_TYPE, EMULATED)
    else:
        first, second = int4_operands(block, VALUE_TYPE, EMULATED)
    first_sum = tl.dot(weights, first, first_sum, input_precision="ieee")
    second_sum = tl.dot(weights, second, second_sum, input_precision="ieee")
    return first_sum, second_sum


@triton.jit
def soften(scores, top, total):
    """One step of the running softmax in base 2: weights, factor of what was summed before, new maximum and total."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    factor = tl.exp2(top - base)
    return weights, factor, new_top, total * factor + tl.sum(weights, 1)


@triton.jit
def byte_operand(block, FORMAT: tl.constexpr, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """Exact: 127 has 7 bits, an fp8 number 4."""
    if FORMAT == "fp8":
        return fp8_operand(block, dtype, EMULATED)
    elif FORMAT == "fp8_converted":
        return converted_fp8(block, dtype, EMULATED)
    elif EMULATED:
        return to_operand(block.to(tl.float32), dtype, EMULATED)
    else:
        return block.to(dtype)


@triton.jit
def int4_operands(block, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """Low and high nibbles n as ``n - 7.5 + int4_offset``.

    A 16-bit float in [16, 32) is 16 + n with n in its upper mantissa bits: two integer operations a level and no
    conversion, which would cost more than the product.
    """
    if dtype == tl.bfloat16:
        bits = block.to(tl.int16)
        low = (((bits << 3) & 0x78) | 0x4180).to(tl.bfloat16, bitcast=True)
        high = (((bits >> 1) & 0x78) | 0x4180).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        bits = block.to(tl.int16)
        low = (((bits << 6) & 0x3C0) | 0x4C00).to(tl.float16, bitcast=True)
        high = (((bits << 2) & 0x3C0) | 0x4C00).to(tl.float16, bitcast=True)
    else:
        low = (block & 15).to(tl.float32)
        high = (block >> 4).to(tl.float32)
    return to_operand(low, dtype, EMULATED), to_operand(high, dtype, EMULATED)


@triton.jit
def int4_offset(dtype: tl.constexpr):
    """What ``int4_operands`` adds to a level."""
    return 7.5 if dtype == tl.float32 else 23.5
