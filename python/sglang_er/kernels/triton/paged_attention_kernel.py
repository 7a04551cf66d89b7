"""Attention of one query token and one KV head over some lanes of its context (see ``paged_attention.py``)."""

# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from sglang_er.kernels.triton.paged_attention_blocks import (
    add_pool,
    add_shadow,
    int4_offset,
    pool_scores,
    shadow_scores,
    soften,
)
from sglang_er.kernels.triton.paged_attention_merge import find_request, first_split, seen_range
from sglang_er.kernels.triton.rotation import rotate
from sglang_er.kernels.triton.rounding import to_operand


@triton.jit(do_not_specialize=["requests", "first_token", "exact_newest"])
def attend_kernel(
    q,
    keys,
    values,
    table,
    rows,
    query_begin,
    context_lens,
    key_levels,
    value_levels,
    key_scales,
    value_scales,
    valid,
    sums,
    maxima,
    totals,
    requests,
    first_token,
    exact_newest,
    window,
    scale,
    q_stride,
    key_stride,
    value_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_COLS: tl.constexpr,
    VALUE_COLS: tl.constexpr,
    POOL_TYPE: tl.constexpr,
    KEY_TYPE: tl.constexpr,
    VALUE_TYPE: tl.constexpr,
    STEPS: tl.constexpr,
    NORM: tl.constexpr,
    EMULATED: tl.constexpr,
):
    local = tl.program_id(0)
    kv_head = tl.program_id(1)
    token = first_token + local
    request = find_request(query_begin, requests, token)
    begin, end, context = seen_range(query_begin, context_lens, request, token, window)
    old = tl.minimum(tl.maximum(context - exact_newest, 0), end)  # the shadow serves positions before it
    table += tl.load(rows + request) * table_stride

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    dims = tl.arange(0, KEY_COLS)
    pointers = q + token.to(tl.int64) * q_stride + (head * HEAD_DIM)[:, None] + dims[None, :]
    query = tl.load(pointers, mask=(row < GROUP)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    pool_query = to_operand(query, POOL_TYPE, EMULATED)
    if FORMAT == "int4":  # rotated, in even and odd dimensions
        rotated = rotate(query.to(tl.float32), ROWS, KEY_COLS, STEPS, NORM)
        even, odd = tl.split(tl.reshape(rotated, (ROWS, KEY_COLS // 2, 2)))
        first_query = to_operand(even, KEY_TYPE, EMULATED)
        second_query = to_operand(odd, KEY_TYPE, EMULATED)
        query_sum = tl.sum(first_query.to(tl.float32), 1) + tl.sum(second_query.to(tl.float32), 1)
    else:
        first_query = to_operand(query, KEY_TYPE, EMULATED)
        second_query = first_query
        query_sum = tl.zeros([ROWS], tl.float32)

    keys += kv_head * HEAD_DIM
    values += kv_head * VALUE_DIM
    column = tl.arange(0, VALUE_COLS // 2)
    if FORMAT == "int4":  # the dimensions of a byte's low and high nibble
        first_dims = column // 16 * 32 + column % 16
        second_dims = first_dims + 16
    else:
        first_dims = column
        second_dims = column + VALUE_COLS // 2

    for lane in range(tl.program_id(2), LANES, tl.num_programs(2)):
        split = first_split(lane, begin, SPLIT, LANES)
        if split * SPLIT < end:
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            weight_sum = tl.zeros([ROWS, 8], tl.float32)  # of what meets int4 values, in every column
            first_sum = tl.zeros([ROWS, VALUE_COLS // 2], tl.float32)
            second_sum = tl.zeros([ROWS, VALUE_COLS // 2], tl.float32)
            for part in range(split, tl.cdiv(end, SPLIT), LANES):
                start = tl.maximum(part * SPLIT, begin // KEYS * KEYS)
                stop = tl.minimum(part * SPLIT + SPLIT, end)
                middle = start
                if FORMAT != "none":
                    middle = tl.maximum(start, tl.minimum(tl.cdiv(old, KEYS) * KEYS, stop))
                    for block in range(start, middle, KEYS):
                        position = block + tl.arange(0, KEYS)
                        seen = (position >= begin) & (position < end)
                        slot = tl.load(table + position, mask=seen, other=0).to(tl.int64)
                        stored = tl.load(valid + slot, mask=seen & (position < old), other=0) != 0
                        missing = seen & ~stored
                        incomplete = tl.max(missing.to(tl.int32), 0) > 0
                        shadow_row = slot * KV_HEADS + kv_head
                        scores = shadow_scores(
                            first_query,
                            second_query,
                            query_sum,
                            key_levels,
                            shadow_row,
                            stored,
                            HEAD_DIM,
                            KEY_COLS,
                            FORMAT,
                            KEY_TYPE,
                            EMULATED,
                        )
                        key_scale = tl.load(key_scales + shadow_row, mask=stored, other=0.0).to(tl.float32)
                        scores = tl.where(stored[None, :], scores * (key_scale * scale)[None, :], float("-inf"))
                        if incomplete:
                            exact = pool_scores(pool_query, keys, slot, missing, key_stride, HEAD_DIM, KEY_COLS)
                            scores = tl.where(missing[None, :], exact * scale, scores)
                        weights, factor, top, total = soften(scores, top, total)
                        first_sum *= factor[:, None]
                        second_sum *= factor[:, None]
                        value_scale = tl.load(value_scales + shadow_row, mask=stored, other=0.0).to(tl.float32)
                        scaled = tl.where(stored[None, :], weights * value_scale[None, :], 0.0)
                        scaled = to_operand(scaled, VALUE_TYPE, EMULATED)
                        if FORMAT == "int4":
                            ones = tl.full([KEYS, 8], 1.0, scaled.dtype)
                            weight_sum = tl.dot(scaled, ones, weight_sum * factor[:, None], input_precision="ieee")
                        first_sum, second_sum = add_shadow(
                            first_sum,
                            second_sum,
                            scaled,
                            value_levels,
                            shadow_row,
                            stored,
                            VALUE_DIM,
                            VALUE_COLS,
                            FORMAT,
                            VALUE_TYPE,
                            EMULATED,
                        )
                        if incomplete:
                            first_sum, second_sum = add_pool(
                                first_sum,
                                second_sum,
                                to_operand(tl.where(missing[None, :], weights, 0.0), POOL_TYPE, EMULATED),
                                values,
                                slot,
                                missing,
                                value_stride,
                                first_dims,
                                second_dims,
                                VALUE_DIM,
                            )
                for block in range(middle, stop, KEYS):
                    position = block + tl.arange(0, KEYS)
                    seen = (position >= begin) & (position < end)
                    slot = tl.load(table + position, mask=seen, other=0).to(tl.int64)
                    scores = pool_scores(pool_query, keys, slot, seen, key_stride, HEAD_DIM, KEY_COLS)
                    scores = tl.where(seen[None, :], scores * scale, float("-inf"))
                    weights, factor, top, total = soften(scores, top, total)
                    weight_sum *= factor[:, None]
                    first_sum, second_sum = add_pool(
                        first_sum * factor[:, None],
                        second_sum * factor[:, None],
                        to_operand(weights, POOL_TYPE, EMULATED),
                        values,
                        slot,
                        seen,
                        value_stride,
                        first_dims,
                        second_dims,
                        VALUE_DIM,
                    )
            if FORMAT == "int4":
                excess = tl.max(weight_sum, 1)[:, None] * int4_offset(VALUE_TYPE)
                first_sum -= excess
                second_sum -= excess
            at = (local.to(tl.int64) * (KV_HEADS * GROUP) + head) * LANES + lane
            tl.store(maxima + at, top, mask=row < GROUP)
            tl.store(totals + at, total, mask=row < GROUP)
            lanes = sums + (at * VALUE_DIM)[:, None]
            own = (row < GROUP)[:, None]
            tl.store(lanes + first_dims[None, :], first_sum, mask=own & (first_dims < VALUE_DIM)[None, :])
            tl.store(lanes + second_dims[None, :], second_sum, mask=own & (second_dims < VALUE_DIM)[None, :])
