# Quantizes slots of a layer's KV pool into its shadow (layout and formulas: csrc/include/sglang_er/kv_shadow.h).
#
# A row is one (slot, KV head). A program takes a few rows: their keys are loaded whole, rotated for int4 (rotation.py)
# and rounded; values of int4 are loaded as the two halves of every 32 dimensions, whose levels share a byte. All
# levels and scales equal the reference's bit for bit: true division, no fused multiply-add, ties to even.
# Bound by memory traffic: it reads (head_dim + value_dim) * 2 bytes a row and writes a quarter of that (int4). Decode
# steps store a few hundred rows, where a launch is all that counts. A slot outside the pool is left out, since the host
# cannot look at the list.
#
# mypy: allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.kv_shadow import LEVELS, KvShadow, ShadowFormat
from sglang_er.kernels.triton.fp8 import fp8_code
from sglang_er.kernels.triton.rotation import rotate, rotation_norm, rotation_steps
from sglang_er.kernels.triton.rounding import emulated, round_to_int, to_operand

# 16 elements a thread at 128 dimensions: one 16-byte load per thread and half the butterfly stays in a thread.
_ROWS = 16
_WARPS = 4


def kv_shadow_store(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, shadow: KvShadow) -> None:
    rows = slots.shape[0] * keys.shape[1]
    if rows == 0:
        return
    head_dim, value_dim = keys.shape[2], values.shape[2]
    _store_kernel[(triton.cdiv(rows, _ROWS),)](
        keys,
        values,
        slots,
        shadow.keys,
        shadow.values,
        shadow.key_scales,
        shadow.value_scales,
        rows,
        keys.shape[0],
        keys.stride(0),
        values.stride(0),
        **_constants(keys.shape[1], head_dim, value_dim, shadow.format),
        **compile_options(),
    )


def compile_options(*_: Any) -> dict[str, Any]:
    return {"num_warps": _WARPS, "enable_fp_fusion": False}


def _constants(kv_heads: int, head_dim: int, value_dim: int, format: ShadowFormat) -> dict[str, Any]:
    return {
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "FORMAT": format,
        "ROWS": _ROWS,
        "KEY_COLS": triton.next_power_of_2(head_dim),
        "VALUE_COLS": triton.next_power_of_2(value_dim),
        "STEPS": rotation_steps(head_dim),
        "NORM": rotation_norm(head_dim),
        "EMULATED": emulated(),
    }


@triton.jit(do_not_specialize=["rows", "pool_slots"])
def _store_kernel(
    keys,
    values,
    slots,
    key_levels,
    value_levels,
    key_scales,
    value_scales,
    rows,
    pool_slots,
    key_stride,
    value_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_COLS: tl.constexpr,
    VALUE_COLS: tl.constexpr,
    STEPS: tl.constexpr,
    NORM: tl.constexpr,
    EMULATED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = row < rows
    slot = tl.load(slots + row // KV_HEADS, mask=used, other=0)
    used = used & (slot >= 0) & (slot < pool_slots)
    head = row % KV_HEADS
    shadow_row = slot * KV_HEADS + head  # of the scales; levels lie in the same order
    key_rows = keys + slot * key_stride + head * HEAD_DIM
    value_rows = values + slot * value_stride + head * VALUE_DIM

    if FORMAT != "int4":
        _store_plain(key_rows, key_levels, key_scales, shadow_row, used, HEAD_DIM, KEY_COLS, FORMAT, EMULATED)
        _store_plain(value_rows, value_levels, value_scales, shadow_row, used, VALUE_DIM, VALUE_COLS, FORMAT, EMULATED)
    else:
        x = _load(key_rows, tl.arange(0, KEY_COLS), HEAD_DIM, used)
        x = rotate(x, ROWS, KEY_COLS, STEPS, NORM)
        scale = _scale(tl.max(tl.abs(x), 1), 8.0, EMULATED)
        levels = _levels(x, scale, 7.5, 0.0, 15.0)
        even, odd = tl.split(tl.reshape(levels, (ROWS, KEY_COLS // 2, 2)))
        _store(key_levels, shadow_row, tl.arange(0, KEY_COLS // 2), HEAD_DIM // 2, used, even | odd << 4)
        tl.store(key_scales + shadow_row, scale.to(tl.bfloat16), mask=used)
        byte = tl.arange(0, VALUE_COLS // 2)
        first = byte // 16 * 32 + byte % 16
        x = _load(value_rows, first, VALUE_DIM, used)
        y = _load(value_rows, first + 16, VALUE_DIM, used)
        scale = _scale(tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(y), 1)), 8.0, EMULATED)
        levels = _levels(x, scale, 7.5, 0.0, 15.0) | _levels(y, scale, 7.5, 0.0, 15.0) << 4
        _store(value_levels, shadow_row, byte, VALUE_DIM // 2, used, levels)
        tl.store(value_scales + shadow_row, scale.to(tl.bfloat16), mask=used)


@triton.jit
def _store_plain(
    rows,
    levels,
    scales,
    shadow_row,
    used,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    FORMAT: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """A byte a dimension."""
    columns = tl.arange(0, COLS)
    x = _load(rows, columns, SIZE, used)
    largest = tl.max(tl.abs(x), 1)
    if FORMAT == "fp8":
        scale = _scale(largest, 448.0, EMULATED)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        block = fp8_code(x * inverse[:, None])
    else:
        scale = _scale(largest, 127.0, EMULATED)
        block = _levels(x, scale, 0.0, -127.0, 127.0)
    _store(levels, shadow_row, columns, SIZE, used, block)
    tl.store(scales + shadow_row, scale.to(tl.bfloat16), mask=used)


@triton.jit
def _load(rows, columns, SIZE: tl.constexpr, used):
    mask = used[:, None] & (columns < SIZE)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, columns, SIZE: tl.constexpr, used, levels):
    mask = used[:, None] & (columns < SIZE)[None, :]
    tl.store(pointer + (row * SIZE)[:, None] + columns[None, :], levels.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scale(largest, STEPS: tl.constexpr, EMULATED: tl.constexpr):
    """In fp32; bf16 holds it exactly."""
    divisor = tl.full(largest.shape, STEPS, tl.float32)
    scale = to_operand(tl.div_rn(largest, divisor), tl.bfloat16, EMULATED).to(tl.float32)
    return tl.maximum(scale, 1.1754943508222875e-38)  # 2^-126


@triton.jit
def _levels(x, scale, SHIFT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    level = x * inverse[:, None] + SHIFT
    return round_to_int(tl.minimum(tl.maximum(level, LOW), HIGH)).to(tl.int32)


_POINTERS = {"slots": "*i64", "key_scales": "*bf16", "value_scales": "*bf16"}
_INTEGERS = dict.fromkeys(("rows", "pool_slots", "key_stride", "value_stride"), "i32")


def _spec(format: ShadowFormat, kv_heads: int, dim: int) -> tuple[Any, dict[str, str], dict[str, Any]]:
    levels = "*i8" if LEVELS[format].dtype == torch.int8 else "*u8"
    types = {"keys": "*bf16", "values": "*bf16", "key_levels": levels, "value_levels": levels, **_POINTERS, **_INTEGERS}
    constants = {**_constants(kv_heads, dim, dim, format), "EMULATED": False}
    signature = {name: types.get(name, "constexpr") for name in _store_kernel.arg_names}
    return _store_kernel, signature, constants


SPECS = [
    *(_spec(format, 4, 128) for format in ("int4", "int8", "fp8")),
    *(_spec("int4", 2, dim) for dim in (64, 96)),
    *(_spec(format, 2, 80) for format in ("int8", "fp8")),
]
