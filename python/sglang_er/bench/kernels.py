"""`sglang-er bench kernels`: all kernels at the layer sizes of real models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sglang_er.bench import attention, linear, packing
from sglang_er.bench.attention import Heads
from sglang_er.bench.linear import Cell, Layer
from sglang_er.bench.packing import Packing
from sglang_er.bench.stream import Bandwidth, Stream
from sglang_er.bench.timing import Timing
from sglang_er.models.tiny import Shape

PARTS = ("linear", "quantize_pack", "attention", "overhead")


@dataclass(frozen=True)
class Plan:
    """`models`: name -> layer sizes; `layers`: others instead, as a model without a name. Bytes that each candidate
    rotates over: `footprint`, and `kv_footprint` of bf16 pool."""

    models: dict[str, Shape]
    layers: Sequence[Layer]
    batches: Sequence[int]
    contexts: Sequence[int]
    queries: Sequence[int]
    isas: Sequence[str]
    parts: Sequence[str]
    timing: Timing
    footprint: int
    kv_footprint: int


@dataclass
class Results:
    """`linear`, `packing`: by model. `bandwidth`: before and after; what ops are compared with was measured in turns
    with them."""

    linear: dict[str, list[Cell]] = field(default_factory=dict)
    packing: dict[str, list[Packing]] = field(default_factory=dict)
    attention: list[attention.Measured] = field(default_factory=list)
    overhead: dict[str, float] = field(default_factory=dict)
    bandwidth: list[Bandwidth] = field(default_factory=list)


def layers_of(shape: Shape) -> list[Layer]:
    """The linear layers of a forward pass, fused as SGLang fuses them."""
    heads = shape.query_heads + 2 * shape.kv_heads
    return [
        Layer("qkv", heads * shape.head_dim, shape.hidden, shape.layers),
        Layer("o", shape.hidden, shape.query_heads * shape.head_dim, shape.layers),
        Layer("gate_up", 2 * shape.mlp, shape.hidden, shape.layers),
        Layer("down", shape.hidden, shape.mlp, shape.layers),
        Layer("lm_head", shape.vocab, shape.hidden),
    ]


def measure(plan: Plan, tell: Callable[[str], None]) -> Results:
    """`tell(line)` is told what was measured, as it comes."""
    results = Results()

    stream = Stream(plan.footprint)
    timing = plan.timing.at_most(3)
    groups = {"": list(plan.layers)} if plan.layers else {name: layers_of(s) for name, s in plan.models.items()}
    with torch.inference_mode():
        results.bandwidth.append(stream.measure(timing))
        tell(f"memory: {results.bandwidth[0].text()}")
        if "overhead" in plan.parts:
            results.overhead = linear.overhead(plan.timing)
        for name, layers in groups.items():
            _measure_layers(plan, name, layers, stream, results, tell)
        if "attention" in plan.parts and attention.available():
            _measure_attention(plan, stream, results, tell)
        results.bandwidth.append(stream.measure(timing))
    return results


def _measure_layers(
    plan: Plan,
    name: str,
    layers: Sequence[Layer],
    stream: Stream,
    results: Results,
    tell: Callable[[str], None],
) -> None:
    for layer in layers:
        label = f"{name} {layer.name} {layer.rows}x{layer.cols}".strip()
        if "quantize_pack" in plan.parts:
            packed = packing.measure(layer, plan.footprint, plan.timing)
            results.packing.setdefault(name, []).append(packed)
            longer = packed.clip_search_seconds / packed.seconds
            tell(
                f"{label}: quantize_pack {packed.rate / 1e9:.1f} GB/s, {packed.share:.2f} of a copy; "
                f"with clip search {longer:.1f} times the time"
            )
        if "linear" in plan.parts:
            for cells in linear.measure(layer, plan.batches, plan.isas, plan.footprint, plan.timing, stream):
                results.linear.setdefault(name, []).extend(cells)
                figures = "  ".join(f"{cell.op} {cell.seconds * 1e6:.0f}" for cell in cells)
                tell(f"{label} M={cells[0].batch} us: {figures}")


def _measure_attention(plan: Plan, stream: Stream, results: Results, tell: Callable[[str], None]) -> None:
    # Models that share their heads share the measurement.
    every = {Heads(shape.query_heads, shape.kv_heads, shape.head_dim): None for shape in plan.models.values()}
    for heads in every:
        for context in plan.contexts:
            for queries in plan.queries:
                found = attention.measure(heads, context, queries, plan.kv_footprint, plan.timing, stream)
                results.attention.append(found)
                figures = "  ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in found.seconds.items())
                tell(
                    f"attention {heads.query}x{heads.kv}x{heads.dim} context {context} queries {queries} us: {figures}"
                )
