"""Roundings of the KV kernels, and what Triton's interpreter cannot do by itself.

The interpreter has no bf16 arithmetic, and it truncates where a GPU rounds to nearest even. Kernels therefore take a
constexpr ``EMULATED``: with it, bf16 operands are fp32 numbers that bf16 can hold, so a test sees the GPU's roundings.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


def emulated() -> bool:
    """Whether kernels run under the interpreter."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def to_operand(x, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """``x`` (16 bits or fp32) rounded to ``dtype``, as an operand of ``tl.dot``."""
    if EMULATED and dtype == tl.bfloat16:
        return nearest_bf16(x.to(tl.float32))
    else:
        return x.to(dtype)


@triton.jit
def store_rounded(pointers, x, mask, EMULATED: tl.constexpr):
    """Stores fp32 ``x`` in the pointers' type, rounded to nearest even."""
    if EMULATED and pointers.dtype.element_ty == tl.bfloat16:
        x = nearest_bf16(x)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def nearest_bf16(x):
    """fp32 to the nearest bf16, ties to even, kept as fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def round_to_int(x):
    """Nearest integer, ties to even, of ``|x| < 2^22``: adding 1.5 * 2^23 leaves no fraction bits.

    Must be compiled without fusing of products and sums, which would skip the rounding of ``x``.
    """
    return (x + 12582912.0) - 12582912.0
