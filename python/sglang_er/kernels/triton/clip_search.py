"""Which range of each group's weights loses least: csrc/include/sglang_er/clip_search.h, whose bits these are.

Products before a sum are exact here, so that it does not matter whether a compiler fuses them.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

# A nibble a candidate, the first one lowest: 64ths of the range that it cuts off below and above.
BOTTOMS = tl.constexpr(0x32302100)
TOPS = tl.constexpr(0x23030120)
CANDIDATES = tl.constexpr(8)
OUTSIDE = tl.constexpr(1440)
_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits
_EVEN_BITS = tl.constexpr(0x4B400000)
_LARGEST = tl.constexpr(3.3895313892515355e38)  # of bf16


@triton.jit
def nearest_bf16(value):
    """fp32 rounded to the nearest bf16, ties to even (finite values)."""
    bits = value.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def bf16_scale(step):
    return tl.maximum(nearest_bf16(step), 1.1754943508222875e-38)  # 2**-126


@triton.jit
def bf16_zero(low):
    return tl.minimum(tl.maximum(nearest_bf16(low), -_LARGEST), _LARGEST)


@triton.jit
def _round_even(x):
    return (x + _EVEN).to(tl.int32, bitcast=True) - _EVEN_BITS


@triton.jit
def units(weights, zero, inverse):
    """1024 to a step; what is far outside is cut, where no candidate is taken anyway."""
    steps = (weights - zero) * inverse
    steps = tl.minimum(tl.where(steps > -4.0, steps, -4.0), 19.0)
    return _round_even(steps * 1024.0)


@triton.jit
def candidate(low, scale, zero, inverse, index):
    """Its scale and zero (fp32 that bf16 can hold), then zero, step and factor as the rule's integers."""
    bottom, top = (BOTTOMS >> (4 * index)) & 15, (TOPS >> (4 * index)) & 15
    made = bf16_scale(scale * ((64 - bottom - top) * 0.015625))
    base = bf16_zero(low + scale * ((15 * bottom) * 0.015625))
    step = _round_even(tl.minimum(made * inverse, 2.0) * 16384.0)
    factor = _round_even(tl.minimum(scale * tl.math.div_rn(1.0, made), 2.0) * 16384.0)
    return made, base, units(base, zero, inverse), step, factor


@triton.jit
def squares(values, live, zero, step, factor):
    """Of the errors of weights [lane, group, input], int32 [lane, group]."""
    above = values - zero[:, :, None]
    level = (above * factor[:, :, None] + 16384) >> 15
    level = tl.minimum(tl.maximum((level + 256) >> 9, 0), 15)
    error = above - ((level * step[:, :, None] + 8) >> 4)
    return tl.sum(tl.where(live, error * error, 0), axis=2)


@triton.jit
def within(lowest, highest, zero, step):
    """Whether no weight is more than 1.4 steps outside of the levels."""
    return (lowest - zero >= -OUTSIDE) & (highest - zero - ((15 * step + 8) >> 4) <= OUTSIDE)
