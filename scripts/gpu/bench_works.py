"""What section `bench_kernels` times, but for sampling (`bench_sampling.py`): calls of an op on memory that rotates, by
label, with the sizes that the table of measured times and the simulator compute with (`at`: as
`kernels/size_classes.py` names them; weights in another layout than ours have none).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as functional

from sglang_er import kernels
from sglang_er.bench.linear import Layer, clone
from sglang_er.kernels import KvShadow, MarlinWeight, PackedWeight, QuantizedWeight, registry, size_classes
from sglang_er.kernels.formats import MARLIN
from sglang_er.kernels.kv_shadow import ShadowFormat

from . import clock, humming
from .sections import Skip

GROUP = 128
DTYPE = torch.bfloat16
TORCH, HUMMING = "torch", "humming"
EXACT_NEWEST = 32
SHADOWS: tuple[ShadowFormat, ...] = ("int4", "fp8")
# Query tokens a request, format of the shadow.
ATTENTION: dict[str, tuple[int, ShadowFormat | None]] = {
    "decode": (1, None),
    **{f"decode {shadow}": (1, shadow) for shadow in SHADOWS},
    "verify 4": (4, None),
}


@dataclass(frozen=True)
class Work:
    """Calls on different memory, the bytes that one of them reads and writes at least, and what else is recorded."""

    runs: Sequence[clock.Run]
    nbytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int


Make = Callable[[str, str], dict[str, Work]]  # (implementation, device) -> label -> work


def linear(op: str, layer: Layer, batches: Sequence[int], name: str, device: str) -> dict[str, Work]:
    weight = torch.randn(layer.rows, layer.cols, device=device).mul_(0.02).bfloat16()
    if op == "bf16_linear":
        weights: list[Any] = [weight.clone() for _ in range(clock.copies_for(weight.nbytes, device))]
        nbytes = weight.nbytes
    else:
        packed = _empty(layer, weight.dtype, name, device)
        kernels.quantize_pack(
            weight, GROUP, out=packed, implementation=MARLIN if name == MARLIN else registry.REFERENCE
        )
        weights = [clone(packed) for _ in range(clock.copies_for(packed.nbytes, device))]
        nbytes = packed.nbytes
    found = {}
    for batch in batches:
        x = torch.randn(batch, layer.cols, device=device).bfloat16()
        out = x.new_empty(batch, layer.rows)
        if name == TORCH:
            runs: list[clock.Run] = [partial(functional.linear, x, w) for w in weights]
        else:
            runs = [partial(getattr(kernels, op), x, w, None, out, implementation=name) for w in weights]
        at = {"at": size_classes.linear(batch, layer.rows, layer.cols, GROUP)}
        facts = {"M": batch, **(at if name != MARLIN else {})}
        found[f"M={batch}"] = Work(runs, nbytes + x.nbytes + out.nbytes, facts)
    return found


def humming_linear(layer: Layer, batches: Sequence[int], name: str, device: str) -> dict[str, Work]:
    """Results are compared before anything is timed."""
    weight = torch.randn(layer.rows, layer.cols, device=device).mul_(0.02).bfloat16()
    first = humming.linear(weight, GROUP, device)
    linears = [first, *(humming.copy(first) for _ in range(clock.copies_for(first.nbytes, device) - 1))]
    found = {}
    for batch in batches:
        x = torch.randn(batch, layer.cols, device=device).bfloat16()
        humming.check(first, x, weight)
        out = x.new_empty(batch, layer.rows)
        runs: list[clock.Run] = [partial(linear, x, out) for linear in linears]
        found[f"M={batch}"] = Work(runs, first.nbytes + x.nbytes + out.nbytes, {"M": batch})
    return found


def _empty(layer: Layer, dtype: torch.dtype, name: str, device: str) -> QuantizedWeight:
    """Buffers in the layout of an implementation. Raises Skip where it has none for the layer."""
    if name != MARLIN:
        return PackedWeight.empty(layer.rows, layer.cols, GROUP, dtype, device)
    if reason := MarlinWeight.refusal(layer.rows, layer.cols, GROUP, dtype):
        raise Skip(f"marlin does not serve [{layer.rows}, {layer.cols}]: {reason}")
    return MarlinWeight.empty(layer.rows, layer.cols, GROUP, dtype, device)


def pack(layer: Layer, name: str, device: str) -> dict[str, Work]:
    weight = torch.randn(layer.rows, layer.cols, device=device).bfloat16()
    weights = [weight.clone() for _ in range(clock.copies_for(weight.nbytes, device))]
    out = _empty(layer, weight.dtype, name, device)
    found = {}
    for label, clip in (("plain", False), ("clip search", True)) if name != MARLIN else (("plain", False),):
        pack = partial(kernels.quantize_pack, group_size=GROUP, clip_search=clip, out=out, implementation=name)
        facts = {"at": size_classes.packing(layer.rows, layer.cols, GROUP, clip)} if name != MARLIN else {}
        found[label] = Work([partial(pack, w) for w in weights], weight.nbytes + out.nbytes, facts)
    return found


def experts(sizes: tuple[int, int, int, int], tokens: Sequence[int], name: str, device: str) -> dict[str, Work]:
    """Bytes: of the experts that the tokens name, each once. Every call has weights and choices of its own."""
    outputs, inner, count, choices = sizes
    shapes = ((count * 2 * inner, outputs), (count * outputs, inner))
    packed = [PackedWeight.empty(*shape, GROUP, DTYPE, device) for shape in shapes]
    for shape, weight in zip(shapes, packed):
        live = torch.randn(shape, device=device).mul_(0.02).bfloat16()
        kernels.quantize_pack(live, GROUP, out=weight, implementation=registry.REFERENCE)
    of_one = sum(weight.nbytes for weight in packed) // count
    found = {}
    for batch in tokens:
        x = torch.randn(batch, outputs, device=device).bfloat16()
        out, weights = torch.empty_like(x), torch.rand(batch, choices, device=device)
        runs: list[clock.Run] = []
        used = 0
        copies = clock.copies_for(of_one * min(count, batch * choices), device)
        for _ in range(copies):
            chosen = torch.rand(batch, count, device=device).argsort(-1)[:, :choices].to(torch.int32)
            used += chosen.unique().numel()
            both = (clone(weight) for weight in packed)
            runs.append(partial(kernels.w4a16_experts, x, *both, chosen, weights, out, implementation=name))
        found[f"T={batch}"] = Work(runs, used * of_one // copies + x.nbytes + out.nbytes)
    return found


def attention(
    heads: Heads, requests: int, context: int, labels: Sequence[str], name: str, device: str
) -> dict[str, Work]:
    """Of `ATTENTION`: decode without and with each shadow, verify of four tokens without."""
    kv_heads, dim = heads.kv, heads.dim
    slots = requests * context
    copies = clock.copies_for(slots * kv_heads * dim, device)  # bytes of the shadow
    formats = {format for label in labels if (format := ATTENTION[label][1]) is not None}
    pools = []
    for _ in range(copies):
        keys, values = (torch.randn(slots, kv_heads, dim, device=device).bfloat16() for _ in range(2))
        every = torch.arange(slots, device=device)
        shadows = {format: KvShadow.empty(slots, kv_heads, dim, dim, format, device) for format in formats}
        for shadow in shadows.values():
            kernels.kv_shadow_store(keys, values, every, shadow, implementation=registry.REFERENCE)
        pools.append((keys, values, shadows))
    table = torch.randperm(slots, device=device).to(torch.int32).view(requests, context)
    rows = torch.arange(requests, device=device)
    lens = torch.full((requests,), context, device=device)
    valid = torch.ones(slots, dtype=torch.uint8, device=device)
    pool_bytes = pools[0][0].nbytes * 2
    found = {}
    for label in labels:
        queries, format = ATTENTION[label]
        q = torch.randn(requests * queries, heads.query, dim, device=device).bfloat16()
        out, begin = torch.empty_like(q), torch.arange(requests + 1, device=device) * queries
        runs: list[clock.Run] = [
            partial(
                kernels.paged_attention,
                *(q, keys, values, table, rows, begin, lens),
                **({"shadow": shadows[format], "valid": valid, "exact_newest": EXACT_NEWEST} if format else {}),
                scale=dim**-0.5,
                out=out,
                implementation=name,
            )
            for keys, values, shadows in pools
        ]
        facts: dict[str, Any] = {"context": context, "kv_bytes": pool_bytes}
        if queries == 1:
            facts["at"] = size_classes.attention(requests, heads.query, kv_heads, dim, format)
        nbytes = pools[0][2][format].nbytes if format else pool_bytes
        found[label] = Work(runs, nbytes + q.nbytes + out.nbytes, facts)
    return found


def store(heads: Heads, counts: Sequence[int], name: str, device: str) -> dict[str, Work]:
    kv_heads, dim = heads.kv, heads.dim
    found = {}
    for count, format in product(counts, SHADOWS):
        read = 2 * count * kv_heads * dim * 2
        slots_in_all = max(4 * count, clock.copies_for(read, device) * count)
        keys, values = (torch.randn(slots_in_all, kv_heads, dim, device=device).bfloat16() for _ in range(2))
        shadow = KvShadow.empty(slots_in_all, kv_heads, dim, dim, format, device)
        order = torch.randperm(slots_in_all, device=device)
        runs: list[clock.Run] = [
            partial(kernels.kv_shadow_store, keys, values, part.contiguous(), shadow, implementation=name)
            for part in order.split(count)
            if len(part) == count
        ]
        facts = {"at": size_classes.storing(count, kv_heads, dim, format)}
        found[f"{count} slots {format}"] = Work(runs, read + shadow.nbytes * count // slots_in_all, facts)
    return found
