"""Section `bench_kernels`: seconds of every implementation at the layer sizes of Qwen2.5-7B and of Qwen3-30B-A3B's
experts, what torch takes for the same, and the share of the bandwidth of a large copy. Section `bench_more`: further
sizes and models, for the table of measured times (`sglang-er kernel-table`). Cells: one op, one implementation, one
layer or shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from sglang_er.bench.kernels import layers_of
from sglang_er.kernels import registry
from sglang_er.kernels.formats import MARLIN
from sglang_er.kernels.source_key import source_key
from sglang_er.models.sizes import PublicSize, public_size
from sglang_er.models.tiny import TINY, Shape

from . import bench_sampling, bench_works, clock
from .bench_works import ATTENTION, DTYPE, HUMMING, TORCH, Heads, Make
from .sections import Cell, Context, Options, Section, Skip

BATCHES, DRY_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128), (1, 2)
# A verify pass has more rows, and torch multiplies them.
TORCH_BATCHES = (*BATCHES, 256, 512, 1024)
LINEAR_OPS = ("w4a16_linear", "w4a8_linear", "bf16_linear")
# What is measured beside the implementations of an op.
LIBRARIES = {"w4a16_linear": [HUMMING], "bf16_linear": [TORCH]}
# Of the further models; torch's product is what a 4-bit one is compared with.
OTHERS_OPS = ("w4a16_linear", "w4a8_linear", "bf16_linear", "quantize_pack")
FIRST = public_size("qwen2", "7b")
# The sizes of Qwen3-4B are from its published configuration.
OTHERS = (public_size("llama", "7b"), PublicSize("Qwen3-4B", Shape(2560, 36, 32, 8, 128, 9728, 151936)))
DRY_MODEL = PublicSize("tiny", TINY)
# Requests and tokens of each: 64k, 256k and 1M tokens of KV.
DECODES, DRY_DECODES = ((8, 8192), (16, 16384), (64, 16384)), ((2, 96),)
# For the table: the draft's attention at every batch, over a short and a long context.
TABLE_DECODES = tuple((requests, context) for requests in BATCHES for context in (2048, 8192))
DRY_TABLE_DECODES = ((1, 64),)
HEADS, OTHER_HEADS, DRY_HEADS = Heads(28, 4, 128), Heads(32, 8, 128), Heads(4, 1, 64)
STORED, DRY_STORED = (64, 1024, 16384), (8,)
# Outputs, inner size, experts and choices of Qwen3-30B-A3B, and tokens.
MIXTURE, DRY_MIXTURE = (2048, 768, 128, 8), (128, 64, 4, 2)
ROUTED, DRY_ROUTED = (1, 4, 16, 64), (1, 4)
SAMPLED, DRY_SAMPLED = ((1, 152064), (16, 152064), (64, 152064)), ((2, 512),)


def cells(options: Options) -> Sequence[Cell]:
    """What tells most comes first."""
    dry, device = options.dry_run, options.device
    heads = DRY_HEADS if dry else HEADS
    found = [Cell("copy", copy), *_layers(DRY_MODEL if dry else FIRST, dry, device, [*LINEAR_OPS, "quantize_pack"], "")]
    for requests, context in DRY_DECODES if dry else DECODES:
        found += _decode(heads, requests, context, list(ATTENTION), device)
    sizes = DRY_SAMPLED if dry else SAMPLED
    for op, make in (
        ("w4a16_experts", partial(bench_works.experts, DRY_MIXTURE if dry else MIXTURE, DRY_ROUTED if dry else ROUTED)),
        ("kv_shadow_store", partial(bench_works.store, heads, DRY_STORED if dry else STORED)),
        ("softmax_rows", partial(bench_sampling.softmax, sizes)),
        ("sample_rows", partial(bench_sampling.sample, sizes)),
        ("draft_sample", partial(bench_sampling.draft, sizes)),
        ("choose_seeded", partial(bench_sampling.choose, sizes)),
        ("verify_chain", partial(bench_sampling.chain, sizes)),
    ):
        composed = [TORCH] if op in bench_sampling.COMPOSED else []
        found += _cells(op, [*_names(op, device), *composed], "", make)
    return found


def more_cells(options: Options) -> Sequence[Cell]:
    """Further sizes of attention, and the layers of further models."""
    dry, device = options.dry_run, options.device
    heads, found = DRY_HEADS if dry else HEADS, list[Cell]()
    for requests, context in DRY_TABLE_DECODES if dry else [size for size in TABLE_DECODES if size not in DECODES]:
        found += _decode(heads, requests, context, ["decode int4"], device)
    if dry:
        return found
    for index, model in enumerate(OTHERS):
        found += _layers(model, dry, device, OTHERS_OPS, f"{model.name} ")
        if index == 0:  # the others have the same heads
            for requests, context in TABLE_DECODES:
                found += _decode(OTHER_HEADS, requests, context, ["decode int4"], device)
            store, kv = partial(bench_works.store, OTHER_HEADS, STORED), f"{OTHER_HEADS.kv} heads"
            found += _cells("kv_shadow_store", _names("kv_shadow_store", device), kv, store)
    return found


def _layers(model: PublicSize, dry: bool, device: str, ops: Sequence[str], prefix: str) -> list[Cell]:
    """`prefix`: of the layers' names; none for the model that is measured first."""
    found: list[Cell] = []
    for layer in layers_of(model.shape):
        what = f"{prefix}{layer.name} {layer.rows}x{layer.cols}"
        facts = {"model": model.name, "layer": layer.name, "count": layer.count}
        for op in ops:
            if op == "quantize_pack":
                found += _cells(op, _names(op, device), what, partial(bench_works.pack, layer), facts)
                continue
            for name in [*_names(op, device), *LIBRARIES.get(op, [])]:
                batches = DRY_BATCHES if dry else TORCH_BATCHES if name == TORCH else BATCHES
                make = bench_works.humming_linear if name == HUMMING else partial(bench_works.linear, op)
                found += _cells(op, [name], what, partial(make, layer, batches), facts)
    return found


def _decode(heads: Heads, requests: int, context: int, labels: Sequence[str], device: str) -> list[Cell]:
    op = "paged_attention"
    shape = "" if heads in (HEADS, DRY_HEADS) else f"{heads.query}x{heads.kv}x{heads.dim} "
    make = partial(bench_works.attention, heads, requests, context, labels)
    return _cells(op, _names(op, device), f"{shape}B={requests} S={context}", make)


def _names(op: str, device: str) -> list[str]:
    """Marlin packs on any device, as the reference does."""
    found = registry.implementations(op)
    return [entry.name for entry in found if entry.device == device or (entry.name, entry.device) == (MARLIN, None)]


def _cells(op: str, names: Sequence[str], what: str, make: Make, facts: Mapping[str, Any] | None = None) -> list[Cell]:
    return [Cell(f"{op} {name} {what}".strip(), partial(measure, op, name, make, facts or {})) for name in names]


def copy(context: Context) -> dict[str, Any]:
    rate = clock.copy_bandwidth(context.options.device)
    return {"shown": f"{rate / 1e12:.3f} TB/s", "bytes_per_second": rate}


def measure(op: str, name: str, make: Make, facts: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """A row for every label that the implementation serves. Raises Skip if it serves none."""
    device = context.options.device
    rate = clock.copy_bandwidth(device)
    found: dict[str, Any] = {}
    not_served: dict[str, str] = {}
    with torch.inference_mode():
        for label, work in make(name, device).items():
            try:
                timed = clock.measure(work.runs, device)
            except TypeError as refused:
                if "serve" not in str(refused):
                    raise
                not_served[label] = str(refused)
                continue
            found[label] = {
                "us": round(1e6 * timed.seconds, 3),
                "bytes": work.nbytes,
                "share_of_copy": round(work.nbytes / timed.seconds / rate, 4),
                "graph": timed.graph,
                **work.facts,
            }
    if not found:
        raise Skip("; ".join(sorted(set(not_served.values()))))
    shown = ", ".join(f"{label} {row['us']:.1f} us {100 * row['share_of_copy']:.0f} %" for label, row in found.items())
    return {
        "shown": shown,
        "copy_bytes_per_second": rate,
        "op": op,
        "implementation": name,
        "dtype": str(DTYPE).removeprefix("torch."),
        "kernels": source_key(),
        **facts,
        "rows": found,
        "not_served": not_served,
    }


SECTION = Section("bench_kernels", cells, isolated=True)
MORE = Section("bench_more", more_cells, isolated=True)
