"""Paged attention over a bf16 KV pool and over its int8 and int4 copies, against torch's attention on gathered KV.

One request at a time, as in the tail of a rollout. Requests rotate through a pool of which even the int4 copy is larger
than a last-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_er import kernels
from sglang_er.bench.stream import Stream
from sglang_er.bench.timing import Run, Timing, rotate

# Newest tokens that are read from the pool even where a copy is read.
_EXACT_NEWEST = 64


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Measured:
    """Seconds by what is read. `bytes`: of the bf16 pool for one request; `read`: bytes/s that memory gave then."""

    heads: Heads
    context: int
    queries: int
    seconds: dict[str, float]
    bytes: int
    read: float

    def speed_up(self, name: str) -> float:
        """Over attention that reads the bf16 pool."""
        return self.seconds["bf16"] / self.seconds[name]


def available() -> bool:
    return hasattr(kernels, "paged_attention")


def measure(heads: Heads, context: int, queries: int, footprint: int, timing: Timing, stream: Stream) -> Measured:
    """`queries`: new tokens of the request, 1 in a decode step."""
    found = candidates(heads, context, queries, footprint)
    seconds = timing.at_most(3).seconds({**found, **stream.readers()})
    chosen = {name: seconds[name] for name in found}
    return Measured(heads, context, queries, chosen, 4 * context * heads.kv * heads.dim, stream.rate(seconds))


def candidates(heads: Heads, context: int, queries: int, footprint: int) -> dict[str, Run]:
    generator = torch.Generator().manual_seed(context)
    requests = max(2, footprint // (4 * context * heads.kv * heads.dim))

    def pool() -> torch.Tensor:
        one = torch.randn(context, heads.kv, heads.dim, generator=generator).bfloat16()
        return one.repeat(requests, 1, 1)

    keys, values = pool(), pool()
    table = torch.arange(requests * context, dtype=torch.int32).view(requests, context)
    q = torch.randn(queries, heads.query, heads.dim, generator=generator).bfloat16()
    bounds, length = torch.tensor([0, queries]), torch.tensor([context])
    slots, valid = table.long(), torch.ones(len(keys), dtype=torch.uint8)
    last = context - queries + torch.arange(queries)
    mask = None if queries == 1 else torch.arange(context) <= last[:, None]
    scale = heads.dim**-0.5

    def paged(request: int, **shadow: Any) -> Run:
        rows = torch.tensor([request])
        arguments = (q, keys, values, table, rows, bounds, length)
        return partial(kernels.paged_attention, *arguments, scale=scale, **shadow)

    def torchs(request: int) -> object:
        """As a backend without this kernel does it; making index and mask is not timed."""
        return scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[slots[request]].transpose(0, 1)[None],
            values[slots[request]].transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )

    every, position = range(requests), count()
    found = {
        "torch": rotate([partial(torchs, request) for request in every], position),
        "bf16": rotate([paged(request) for request in every], position),
    }
    for name in ("int8", "int4") if hasattr(kernels, "KvShadow") else ():
        shadow = kernels.KvShadow.empty(len(keys), heads.kv, heads.dim, heads.dim, name)
        kernels.kv_shadow_store(keys, values, torch.arange(len(keys)), shadow)
        quantized: dict[str, Any] = {"shadow": shadow, "valid": valid, "exact_newest": _EXACT_NEWEST}
        found[name] = rotate([paged(request, **quantized) for request in every])
    return found
