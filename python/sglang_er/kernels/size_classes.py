"""The ops whose implementation may depend on sizes, and what of a call's arguments is its size.

Only ops of the draft side. Implementations add up in different orders, so one that changes with the number of rows
changes a row's last bits from batch to batch. A draft may be drawn from any q: there that costs nothing. What the
policy itself computes may not depend on who shares the batch, so `softmax_rows` and `sample_rows`, which verification
needs as well, and `verify_chain` keep one implementation for all sizes. `paged_attention` is the draft's on a GPU
(SGLang's own backend attends for the policy), and only calls with one token a request, as a draft makes them, have a
size here. `quantize_pack` and `kv_shadow_store` give the same bytes whoever computes.

Only weights in our own layout. In which one a layer lies is decided once; those in Marlin's are served by Marlin alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_er.kernels.base import PackedWeight

At = tuple[str, tuple[int, ...]]
"""(kind, sizes): implementations are compared within a kind, by sizes that are near in log space."""


class SizeClass(NamedTuple):
    """`names`: of the sizes; `at`: the op's arguments (the implementation's own) -> where they are, None: nowhere."""

    names: tuple[str, ...]
    at: Callable[..., At | None]


def linear(rows: int, outputs: int, inputs: int, group_size: int) -> At:
    return f"group {group_size}", (rows, outputs, inputs)


def packing(outputs: int, inputs: int, group_size: int, clip_search: bool) -> At:
    return f"group {group_size}{' clip search' if clip_search else ''}", (outputs, inputs)


def attention(requests: int, heads: int, kv_heads: int, head_dim: int, format: str | None) -> At:
    """`format`: of the shadow, None for the pool itself. The context is on the device, and another one at every replay
    of a graph: no choice can ask for it."""
    return _kv_kind(format, head_dim), (requests, heads, kv_heads)


def storing(slots: int, kv_heads: int, head_dim: int, format: str) -> At:
    return _kv_kind(format, head_dim), (slots, kv_heads)


@functools.cache
def _kv_kind(format: str | None, head_dim: int) -> str:
    return f"{format or 'pool'} head_dim {head_dim}"


def _of_linear(x: Any, weight: Any, *_: Any) -> At | None:
    if not isinstance(weight, PackedWeight):
        return None
    return linear(x.shape[0], weight.out_features, weight.in_features, weight.group_size)


def _of_packing(weight: Any, clip_search: Any, out: Any) -> At | None:
    if not isinstance(out, PackedWeight):
        return None
    outputs, inputs = weight.shape
    return packing(outputs, inputs, out.group_size, clip_search)


def _of_attention(*arguments: Any) -> At | None:
    q, keys, rows, window, shadow = arguments[0], arguments[1], arguments[4], arguments[8], arguments[9]
    tokens, heads, head_dim = q.shape
    if tokens != rows.shape[0] or window >= 0:
        return None
    return attention(tokens, heads, keys.shape[1], head_dim, None if shadow is None else shadow.format)


def _of_storing(keys: Any, values: Any, slots: Any, shadow: Any) -> At:
    _, kv_heads, head_dim = keys.shape
    return storing(slots.shape[0], kv_heads, head_dim, shadow.format)


CLASSES: dict[str, SizeClass] = {
    "w4a16_linear": SizeClass(("rows", "outputs", "inputs"), _of_linear),
    "w4a8_linear": SizeClass(("rows", "outputs", "inputs"), _of_linear),
    "quantize_pack": SizeClass(("outputs", "inputs"), _of_packing),
    "paged_attention": SizeClass(("requests", "heads", "kv_heads"), _of_attention),
    "kv_shadow_store": SizeClass(("slots", "kv_heads"), _of_storing),
}
