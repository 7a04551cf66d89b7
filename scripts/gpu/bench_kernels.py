"""Section `bench_kernels`: seconds of every implementation at the layer sizes of Qwen2.5-7B, what torch takes for the
same, and the share of the bandwidth of a large copy. Cells: one op, one implementation, one layer or shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional

from sglang_er import kernels
from sglang_er.bench.kernels import layers_of
from sglang_er.bench.linear import Layer, clone
from sglang_er.kernels import KvShadow, registry
from sglang_er.kernels.chain_ops import verify_chain
from sglang_er.models.sizes import public_size
from sglang_er.models.tiny import TINY

from . import clock
from .sections import Cell, Context, Options, Section, Skip

GROUP = 128
TORCH = "torch"
BATCHES, DRY_BATCHES = (1, 2, 4, 8, 16, 32, 64), (1, 2)
# Requests and tokens of each: 64k, 256k and 1M tokens of KV.
DECODES, DRY_DECODES = ((8, 8192), (16, 16384), (64, 16384)), ((2, 96),)
HEADS = (28, 4, 128)
STORED, DRY_STORED = (64, 1024, 16384), (8,)
SAMPLED, DRY_SAMPLED = ((1, 152064), (16, 152064), (64, 152064)), ((2, 512),)
EXACT_NEWEST = 32
GAMMA = 3
LINEAR_OPS = ("w4a16_linear", "w4a8_linear", "bf16_linear")


@dataclass(frozen=True)
class Work:
    """Calls on different memory, and the bytes that one of them reads and writes at least."""

    runs: Sequence[clock.Run]
    nbytes: int


Make = Callable[[str, str], dict[str, Work]]  # (implementation, device) -> label -> work


def cells(options: Options) -> Sequence[Cell]:
    dry = options.dry_run
    shape = TINY if dry else public_size("qwen2", "7b").shape
    batches = DRY_BATCHES if dry else BATCHES
    found = [Cell("copy", copy)]
    for layer in layers_of(shape):
        for op in LINEAR_OPS:
            names = [*_names(op, options.device), *([TORCH] if op == "bf16_linear" else [])]
            found += _cells(op, names, f"{layer.name} {layer.rows}x{layer.cols}", partial(_linear, op, layer, batches))
        names = _names("quantize_pack", options.device)
        found += _cells("quantize_pack", names, f"{layer.name} {layer.rows}x{layer.cols}", partial(_pack, layer))
    for requests, context in DRY_DECODES if dry else DECODES:
        names = _names("paged_attention", options.device)
        make = partial(_attention, requests, context, dry)
        found += _cells("paged_attention", names, f"B={requests} S={context}", make)
    for op, make in (
        ("kv_shadow_store", partial(_store, DRY_STORED if dry else STORED)),
        ("softmax_rows", partial(_softmax, DRY_SAMPLED if dry else SAMPLED)),
        ("sample_rows", partial(_sample, DRY_SAMPLED if dry else SAMPLED)),
        ("verify_chain", partial(_chain, DRY_SAMPLED if dry else SAMPLED)),
    ):
        found += _cells(op, _names(op, options.device), "", make)
    return found


def _names(op: str, device: str) -> list[str]:
    return [entry.name for entry in registry.implementations(op) if entry.device == device]


def _cells(op: str, names: Sequence[str], what: str, make: Make) -> list[Cell]:
    return [Cell(f"{op} {name} {what}".strip(), partial(measure, name, make)) for name in names]


def copy(context: Context) -> dict[str, Any]:
    rate = clock.copy_bandwidth(context.options.device)
    return {"shown": f"{rate / 1e12:.3f} TB/s", "bytes_per_second": rate}


def measure(name: str, make: Make, context: Context) -> dict[str, Any]:
    device = context.options.device
    rate = clock.copy_bandwidth(device)
    found: dict[str, Any] = {}
    try:
        with torch.inference_mode():
            for label, work in make(name, device).items():
                timed = clock.measure(work.runs, device)
                found[label] = {
                    "us": round(1e6 * timed.seconds, 3),
                    "bytes": work.nbytes,
                    "share_of_copy": round(work.nbytes / timed.seconds / rate, 4),
                    "graph": timed.graph,
                }
    except TypeError as refused:
        if "serve" in str(refused):
            raise Skip(str(refused)) from None
        raise
    shown = ", ".join(f"{label} {row['us']:.1f} us {100 * row['share_of_copy']:.0f} %" for label, row in found.items())
    return {"shown": shown, "copy_bytes_per_second": rate, "rows": found}


def _linear(op: str, layer: Layer, batches: Sequence[int], name: str, device: str) -> dict[str, Work]:
    weight = torch.randn(layer.rows, layer.cols, device=device).mul_(0.02).bfloat16()
    if op == "bf16_linear":
        weights: list[Any] = [weight.clone() for _ in range(clock.copies_for(weight.nbytes, device))]
        nbytes = weight.nbytes
    else:
        packed = kernels.quantize_pack(weight, GROUP, implementation=registry.REFERENCE)
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
        found[f"M={batch}"] = Work(runs, nbytes + x.nbytes + out.nbytes)
    return found


def _pack(layer: Layer, name: str, device: str) -> dict[str, Work]:
    weight = torch.randn(layer.rows, layer.cols, device=device).bfloat16()
    weights = [weight.clone() for _ in range(clock.copies_for(weight.nbytes, device))]
    out = kernels.PackedWeight.empty(layer.rows, layer.cols, GROUP, weight.dtype, device)
    runs = [partial(kernels.quantize_pack, w, GROUP, out=out, implementation=name) for w in weights]
    return {"": Work(runs, weight.nbytes + out.nbytes)}


def _attention(requests: int, context: int, dry: bool, name: str, device: str) -> dict[str, Work]:
    """Decode without and with an int4 shadow, verify of four tokens without."""
    heads, kv_heads, dim = (4, 1, 64) if dry else HEADS
    slots = requests * context
    copies = clock.copies_for(slots * kv_heads * dim, device)  # bytes of the shadow
    pools = []
    for _ in range(copies):
        keys, values = (torch.randn(slots, kv_heads, dim, device=device).bfloat16() for _ in range(2))
        shadow = KvShadow.empty(slots, kv_heads, dim, dim, 4, device)
        every = torch.arange(slots, device=device)
        kernels.kv_shadow_store(keys, values, every, shadow, implementation=registry.REFERENCE)
        pools.append((keys, values, shadow))
    table = torch.randperm(slots, device=device).to(torch.int32).view(requests, context)
    rows = torch.arange(requests, device=device)
    lens = torch.full((requests,), context, device=device)
    valid = torch.ones(slots, dtype=torch.uint8, device=device)
    pool_bytes, shadow_bytes = pools[0][0].nbytes * 2, pools[0][2].nbytes
    found = {}
    for label, queries, bits, nbytes in (
        ("decode", 1, 0, pool_bytes),
        ("decode int4", 1, 4, shadow_bytes),
        ("verify 4", 4, 0, pool_bytes),
    ):
        q = torch.randn(requests * queries, heads, dim, device=device).bfloat16()
        out, begin = torch.empty_like(q), torch.arange(requests + 1, device=device) * queries
        runs: list[clock.Run] = [
            partial(
                kernels.paged_attention,
                *(q, keys, values, table, rows, begin, lens),
                **({"shadow": shadow, "valid": valid, "exact_newest": EXACT_NEWEST} if bits else {}),
                scale=dim**-0.5,
                out=out,
                implementation=name,
            )
            for keys, values, shadow in pools
        ]
        found[label] = Work(runs, nbytes + q.nbytes + out.nbytes)
    return found


def _store(counts: Sequence[int], name: str, device: str) -> dict[str, Work]:
    _, kv_heads, dim = HEADS
    found = {}
    for count in counts:
        read = 2 * count * kv_heads * dim * 2
        slots_in_all = max(4 * count, clock.copies_for(read, device) * count)
        keys, values = (torch.randn(slots_in_all, kv_heads, dim, device=device).bfloat16() for _ in range(2))
        shadow = KvShadow.empty(slots_in_all, kv_heads, dim, dim, 4, device)
        order = torch.randperm(slots_in_all, device=device)
        runs: list[clock.Run] = [
            partial(kernels.kv_shadow_store, keys, values, part.contiguous(), shadow, implementation=name)
            for part in order.split(count)
            if len(part) == count
        ]
        found[f"{count} slots"] = Work(runs, read + shadow.nbytes * count // slots_in_all)
    return found


def _softmax(sizes: Sequence[tuple[int, int]], name: str, device: str) -> dict[str, Work]:
    found = {}
    for rows, cols in sizes:
        logits = torch.randn(rows, cols, device=device)
        out, warmth = torch.empty_like(logits), torch.ones(rows, device=device)
        copies = [logits.clone() for _ in range(clock.copies_for(logits.nbytes, device))]
        runs = [partial(kernels.softmax_rows, c, warmth, out, implementation=name) for c in copies]
        found[f"{rows}x{cols}"] = Work(runs, logits.nbytes + out.nbytes)
    return found


def _sample(sizes: Sequence[tuple[int, int]], name: str, device: str) -> dict[str, Work]:
    found = {}
    for rows, cols in sizes:
        weights = torch.randn(rows, cols, device=device).mul_(3).softmax(-1)
        coins = torch.rand(rows, dtype=torch.float64, device=device)
        copies = [weights.clone() for _ in range(clock.copies_for(weights.nbytes, device))]
        runs = [partial(kernels.sample_rows, c, coins, implementation=name) for c in copies]
        found[f"{rows}x{cols}"] = Work(runs, weights.nbytes)
    return found


def _chain(sizes: Sequence[tuple[int, int]], name: str, device: str) -> dict[str, Work]:
    """At worst a row of p and one of q are read; the drafts' own probabilities are single values."""
    found = {}
    for rows, cols in sizes:
        p = torch.randn(rows, GAMMA + 1, cols, device=device).mul_(3).softmax(-1)
        q = p[:, :GAMMA].flip(0).contiguous()
        drafts = q.argmax(-1)
        coins = torch.rand(rows, GAMMA + 1, dtype=torch.float64, device=device)
        accept, resample = coins[:, :GAMMA], coins[:, GAMMA].contiguous()
        copies = [(p.clone(), q.clone()) for _ in range(clock.copies_for(p.nbytes + q.nbytes, device))]
        runs = [partial(verify_chain, a, b, drafts, accept, resample, implementation=name) for a, b in copies]
        found[f"{rows}x{cols}"] = Work(runs, 2 * rows * cols * p.element_size())
    return found


SECTION = Section("bench_kernels", cells, isolated=True)
