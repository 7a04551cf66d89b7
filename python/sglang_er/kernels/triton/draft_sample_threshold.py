"""Where the filters of a row of logits cut: the smallest weight that top-k, top-p and min-p all keep.

The weight of a logit is 2^((logit - largest) * scale), at most 1: its bits are an integer below 2^30 of the same order.
A key c passes if fewer than top_k weights lie above it, their mass is at most top_p of all, and c is at least min_p's;
if c passes, so does everything above. `narrow` searches the smallest such c, 16 ways a launch: a program for a row and
a block of 1024 logits leaves count and mass of its weights in (candidate, upper end of the interval] for each of the 16
candidates, the row's last program adds them and leaves the interval for the next launch. After eight it is one key.

Nothing is sorted. A launch reads the logits of blocks with a weight in the interval: all in the first, few from the
second or third on. Masses are sums in fp64 in a fixed order; 192 bytes a block are written and read once.
"""
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sglang_er.kernels.triton.arrival import arrives_last
from sglang_er.kernels.triton.softmax_rows import join

WAYS = 16
# Bits below those that a launch decides. The key of 1.0 is below 2^30.
SHIFTS = (26, 22, 18, 14, 10, 6, 2, 0)
LAST_WAYS = 4
# Arguments with a value a row, wherever they lie: one variant of a kernel serves any number of rows.
VIEWS = ("temperatures", "top_ks", "top_ps", "min_ps", "floors", "totals")

_LAST_WAYS = tl.constexpr(LAST_WAYS)
_STRIDE = tl.constexpr(WAYS)
_MOST = tl.constexpr(2**31 - 1)


@triton.jit
def is_limited(top_ks, top_ps, min_ps, row, size, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr):
    """Whether the row has a filter."""
    limited = row < 0
    if TOP_K:
        k = tl.load(top_ks + row)
        limited |= (k > 0) & (k < size)
    if TOP_P:
        limited |= tl.load(top_ps + row) < 1.0
    if MIN_P:
        limited |= tl.load(min_ps + row) > 0.0
    return limited != 0


@triton.jit
def _decide(
    top_ks,
    top_ps,
    min_ps,
    counts,
    masses,
    floors,
    ways,
    above_counts,
    above_masses,
    totals,
    row,
    blocks,
    floor,
    shift,
    FIRST: tl.constexpr,
    WAYS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """From the blocks' counts and masses above each candidate: the next interval, and count and mass above it."""
    index, way = tl.arange(0, BLOCKS)[:, None], tl.arange(0, WAYS)
    place = (row * blocks + index) * _STRIDE + way[None, :]
    count = tl.sum(tl.load(counts + place, mask=index < blocks, other=0), axis=0)
    mass = tl.sum(tl.load(masses + place, mask=index < blocks, other=0.0), axis=0)
    if FIRST:
        above_count, above_mass = 0, 0.0
        total = tl.sum(tl.where(way == 0, mass, 0.0), axis=0)
        tl.store(totals + row, total)
    else:
        above_count, above_mass = tl.load(above_counts + row), tl.load(above_masses + row)
        total = tl.load(totals + row)
    count, mass = count + above_count, mass + above_mass
    candidate = floor - 1 + (way << shift)
    fails = way == 0  # nothing below the interval passes
    if TOP_K:
        k = tl.load(top_ks + row)
        fails = fails | (count >= tl.where(k > 0, k, _MOST))
    if TOP_P:
        p = tl.load(top_ps + row).to(tl.float64)
        fails = fails | (mass > tl.where(p < 1.0, p * total, float("inf")))
    if MIN_P:
        fails = fails | (candidate < tl.load(min_ps + row).to(tl.int32, bitcast=True))
    found = tl.max(tl.where(fails, way, 0), axis=0)
    tl.debug_barrier()  # all threads have read what is overwritten here
    tl.store(floors + row, floor + (found << shift))
    tl.store(ways + row, found)
    # Up to the upper end of the interval nothing more is asked: the last way has what lay above the old one.
    tl.store(above_counts + row, tl.where(found == WAYS - 1, above_count, _at(count, found + 1)))
    tl.store(above_masses + row, tl.where(found == WAYS - 1, above_mass, _at(mass, found + 1)))
    if WAYS == _LAST_WAYS:
        tl.store(totals + row, _at(mass, found))


@triton.jit
def _at(values, place):
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == place, values, 0), axis=0)


@triton.jit(do_not_specialize_on_alignment=[*VIEWS, "ways", "above_counts", "above_masses"])
def narrow(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    tops,
    sums,
    counts,
    masses,
    floors,
    ways,
    above_counts,
    above_masses,
    totals,
    arrived,
    logits_row,
    blocks,
    size,
    shift,
    FIRST: tl.constexpr,
    WAYS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One launch of the search. Per row: floors (the interval's lower end) and ways (which of the last launch's parts
    it is), above_counts and above_masses (of weights above it), totals: the mass of all, and of what is kept after the
    last launch. Rows without a filter do nothing."""
    row, block = tl.program_id(0), tl.program_id(1)
    if is_limited(top_ks, top_ps, min_ps, row, size, TOP_K, TOP_P, MIN_P):
        place = (row * blocks + block) * _STRIDE
        if FIRST:
            floor, here = 0, 1
        else:
            floor, way = tl.load(floors + row), tl.load(ways + row)
            more = tl.load(counts + place + way + 1, mask=way + 1 < _STRIDE, other=0)
            here = tl.load(counts + place + way) - more
        way = tl.arange(0, WAYS)
        count = tl.zeros([WAYS], tl.int32)
        mass = tl.zeros([WAYS], tl.float64)
        if here > 0:
            top, scale, _ = join(temperatures, tops, sums, row, blocks, BLOCKS)
            columns = block * BLOCK + tl.arange(0, BLOCK)
            inside = columns < size
            source = logits + row.to(tl.int64) * logits_row + columns
            values = tl.load(source, mask=inside, other=float("-inf")).to(tl.float32)
            powers = tl.exp2((values - top) * scale)
            keys = tl.where(inside, powers.to(tl.int32, bitcast=True), -1)
            keys = tl.where(keys < floor + (WAYS << shift), keys, -1)
            powers = powers.to(tl.float64)
            for step in tl.static_range(WAYS):
                above = keys >= floor + (step << shift)
                count = tl.where(way == step, tl.sum(above.to(tl.int32), axis=0), count)
                mass = tl.where(way == step, tl.sum(tl.where(above, powers, 0.0), axis=0), mass)
        # All threads have read what the last launch left there, and so agree on `here`, before it is overwritten.
        tl.debug_barrier()
        tl.store(counts + place + way, count)
        tl.store(masses + place + way, mass)
        if arrives_last(arrived, row, blocks):
            _decide(
                top_ks,
                top_ps,
                min_ps,
                counts,
                masses,
                floors,
                ways,
                above_counts,
                above_masses,
                totals,
                row,
                blocks,
                floor,
                shift,
                FIRST,
                WAYS,
                TOP_K,
                TOP_P,
                MIN_P,
                BLOCKS,
            )


_POINTERS = {"temperatures": "*fp32", "top_ks": "*i32", "top_ps": "*fp32", "min_ps": "*fp32", "tops": "*fp32"}
_POINTERS |= {"sums": "*fp64", "counts": "*i32", "masses": "*fp64", "floors": "*i32", "ways": "*i32"}
_POINTERS |= {"above_counts": "*i32", "above_masses": "*fp64", "totals": "*fp64", "arrived": "*i32"}
_SIZES = {"logits_row": "i32", "blocks": "i32", "size": "i32", "shift": "i32"}
FILTERS = ((True, False, False), (False, True, False), (False, False, True), (True, True, True))
SPECS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (
        narrow,
        {"logits": dtype} | _POINTERS | _SIZES,
        {"FIRST": first, "WAYS": ways, "BLOCK": 1024, "BLOCKS": 256}
        | dict(zip(("TOP_K", "TOP_P", "MIN_P"), flags, strict=True)),
    )
    for dtype in ("*fp32", "*bf16")
    for flags in FILTERS
    for first, ways in ((True, WAYS), (False, WAYS), (False, LAST_WAYS))
]
