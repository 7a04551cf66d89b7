"""e4m3fn numbers as bytes, to and from what Triton computes with.

By bit arithmetic, which every GPU has; to operands by the GPU's own conversion where it has one: a kernel of scores
alone (16 queries, 64 keys of 128 dimensions a step) has 408 instructions on sm_90 with it, as many as for int8, and 528
without. Storing is bound by memory either way.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

# Of a kernel's constexpr FORMAT, beside the names of kv_shadow.py: fp8 that the GPU converts.
FP8_CONVERTED = "fp8_converted"


@functools.cache
def converts_fp8(device: torch.device) -> bool:
    """Whether the GPU has the instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def fp8_code(x):
    """int32: the code nearest to fp32 ``x``, ties to even; beyond 448 that of 448, for NaN that of 0."""
    bits = tl.where(x == x, x, 0.0).to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    # Three bits of mantissa are kept, and the exponent loses 127 - 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below 2^-6 codes count steps of 2^-9, to which adding 2^14 rounds.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def converted_fp8(codes, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """The numbers of uint8 ``codes`` as operands of ``tl.dot``, by instructions of the GPU."""
    numbers = codes.to(tl.float8e4nv, bitcast=True)
    if EMULATED and dtype == tl.bfloat16:
        return numbers.to(tl.float32)
    else:
        return numbers.to(dtype)


@triton.jit
def fp8_operand(codes, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """The numbers of uint8 ``codes``, none of them NaN, as operands of ``tl.dot``, by bit arithmetic: exact.

    Sign, exponent and mantissa are shifted to their places, where the exponent counts from another bias, and that is
    taken back by a product; numbers below 2^-6 are subnormal here as there. The byte is taken as a signed one, whose
    sign is in its place at once.
    """
    signed = codes.to(tl.int8, bitcast=True)
    if dtype == tl.float16:
        return ((signed.to(tl.int16) << 7) & -16512).to(tl.float16, bitcast=True) * 256.0
    elif dtype == tl.bfloat16 and not EMULATED:
        return ((signed.to(tl.int16) << 4) & -30736).to(tl.bfloat16, bitcast=True) * 1.329227995784916e36  # 2^120
    else:
        return ((signed.to(tl.int32) << 20) & -2014314496).to(tl.float32, bitcast=True) * 1.329227995784916e36
