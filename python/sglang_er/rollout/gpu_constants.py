"""Constants of the formula from what scripts/gpu_check.sh recorded; each says whether it was measured.

copy bandwidth              bench_kernels, a large copy. Estimated shares keep their bytes per second
linear layers of a step     bench_kernels, torch's product by rows, over all layers of a model
linear layers of a draft    bench_kernels, `w4a16_linear` and `w4a8_linear` in our layout by rows, each layer's fastest
attention of a step         rollout, plain steps of one batch at two contexts
attention of a draft        bench_kernels, decode from the int4 shadow: seconds = launch + bytes / rate, least squares
fixed, per layer            rollout, the smallest plain step less its linear layers and attention
fixed, per draft layer      rollout, steps with 5 and with 3 drafts: they differ by two passes and a wider verify
fixed, per verify           rollout, what is left of a step with 3 drafts
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from sglang_er.models.tiny import Shape
from sglang_er.rollout.costs import Constant
from sglang_er.rollout.gpu_records import PASSED, Record, newest
from sglang_er.rollout.roofline import BF16_BYTES, MODELS, W4_BYTES, Device, RooflineCosts

LAYERS = frozenset({"qkv", "o", "gate_up", "down", "lm_head"})
ATTENTION_LAUNCH = {"today": 12e-6, "target": 6e-6}
"""Seconds of it within the estimate of a draft's layer, by level."""
GAMMAS = 3, 5
DRAFT_OPS = "w4a16_linear", "w4a8_linear"
ESTIMATED, DATA_SHEET = "estimated", "data sheet"
FLOPS, BANDWIDTH = "bf16 FLOPs", "bandwidth"
LINEAR, DRAFT_LINEAR = "linear layers of a step", "linear layers of a draft"
ATTENTION, DRAFT_ATTENTION = "attention of a step", "attention of a draft"
LAYER, DRAFT_LAYER, VERIFY = "fixed, per layer", "fixed, per draft layer", "fixed, per verify"

Found = tuple[Device, list[Record]] | None
"""A device with one constant measured, and the records that it is from; None: they have no such measurement."""


class _Cell(NamedTuple):
    """Of section `rollout`. `context`: mean tokens of a request; `step`: (arm, draft length) -> seconds."""

    record: Record
    shape: Shape
    batch: int
    context: float
    step: dict[tuple[str, int], float]


def measured(device: Device, records: Sequence[Record], level: str) -> tuple[Device, list[Constant]]:
    """`device`: the estimates of `level`; `records`: of one GPU, the oldest first. Raises what a damaged record makes
    its reader raise."""
    kernels = [
        record for record in newest(records, "bench_kernels", "bench_more").values() if record["status"] == PASSED
    ]
    cells = sorted(_cells(newest(records, "rollout").values()), key=lambda cell: cell.batch * cell.context)
    measures: dict[str, Callable[[Device], Found]] = {
        BANDWIDTH: partial(_copy, kernels=kernels),
        LINEAR: partial(_linear, which="target", ops=("bf16_linear",), weight_bytes=BF16_BYTES, kernels=kernels),
        DRAFT_LINEAR: partial(_linear, which="drafter", ops=DRAFT_OPS, weight_bytes=W4_BYTES, kernels=kernels),
        ATTENTION: partial(_attention, cells=cells),
        DRAFT_ATTENTION: partial(_draft_attention, kernels=kernels, launch=ATTENTION_LAUNCH[level]),
        LAYER: partial(_layer, cells=cells),
        DRAFT_LAYER: partial(_draft_layer, cells=cells),
        VERIFY: partial(_verify, cells=cells),
    }
    sources = {FLOPS: DATA_SHEET, BANDWIDTH: DATA_SHEET}
    for name, measure in measures.items():  # each with what those before it found
        if (found := measure(device)) is not None:
            device = found[0]
            sources[name] = _source(found[1])
    if DRAFT_ATTENTION in sources and DRAFT_LAYER not in sources:
        sources[DRAFT_LAYER] = f"{ESTIMATED}, but for its attention launch: {sources[DRAFT_ATTENTION]}"
    return device, [Constant(name, value, sources.get(name, ESTIMATED)) for name, value in shown(device)]


def shown(device: Device) -> list[tuple[str, str]]:
    """(constant, value) of a device."""
    draft = device.layer_seconds if device.draft_layer_seconds is None else device.draft_layer_seconds
    return [
        (FLOPS, f"{device.flops / 1e12:.0f} T"),
        (BANDWIDTH, f"{device.bandwidth / 1e12:.3f} TB/s"),
        (LINEAR, _shares(device, "target")),
        (DRAFT_LINEAR, _shares(device, "drafter")),
        (ATTENTION, f"{device.attention:.2f} of the bandwidth"),
        (DRAFT_ATTENTION, f"{device.draft_attention:.2f} times as fast"),
        (LAYER, f"{1e6 * device.layer_seconds:.1f} us"),
        (DRAFT_LAYER, f"{1e6 * draft:.1f} us"),
        (VERIFY, f"{1e3 * device.verify_seconds:.2f} ms"),
    ]


def _shares(device: Device, which: Literal["target", "drafter"]) -> str:
    linear = getattr(device, which)
    if not linear.measured:
        return f"{linear.bandwidth:.2f} of the bandwidth, {linear.flops:.2f} of the FLOPs"
    (few, first), (many, last) = linear.measured[0], linear.measured[-1]
    return f"{first:.2f} ({few} rows) to {last:.2f} ({many} rows) of the bandwidth"


def _source(records: Iterable[Record]) -> str:
    used = {(record["date"][:10], record["commit"]) for record in records}
    return "measured, " + ", ".join(f"commit {commit} on {date}" for date, commit in sorted(used))


# -- kernels ---------------------------------------------------------------------------------------------------------


def _copy(device: Device, kernels: Sequence[Record]) -> Found:
    """Shares are of the copy's bandwidth then, and the estimated ones grow: their bytes per second were published."""
    for record in kernels:
        if record["cell"] == "copy":
            rate = float(record["values"]["bytes_per_second"])
            grown = device.bandwidth / rate
            return replace(
                device,
                bandwidth=rate,
                target=replace(device.target, bandwidth=device.target.bandwidth * grown),
                drafter=replace(device.drafter, bandwidth=device.drafter.bandwidth * grown),
                attention=device.attention * grown,
            ), [record]
    return None


def _linear(
    device: Device,
    which: Literal["target", "drafter"],
    ops: Sequence[str],
    weight_bytes: float,
    kernels: Sequence[Record],
) -> Found:
    """Of the first model all of whose layers were measured, each as often as a forward has it."""
    # model -> rows -> layer -> (seconds, bytes, record)
    found: dict[str, dict[int, dict[str, tuple[float, float, Record]]]] = {}
    for record in kernels:
        values = record["values"]
        if values.get("op") in ops and values.get("layer") in LAYERS:
            for row in values["rows"].values():
                if "at" not in row:  # a weight in a library's layout
                    continue
                _, (rows, outputs, inputs) = row["at"]
                layers = found.setdefault(values["model"], {}).setdefault(rows, {})
                seconds, nbytes = (values["count"] * x for x in (1e-6 * row["us"], outputs * inputs * weight_bytes))
                if values["layer"] not in layers or seconds < layers[values["layer"]][0]:
                    layers[values["layer"]] = (seconds, nbytes, record)
    for by_rows in found.values():
        whole = {rows: list(layers.values()) for rows, layers in sorted(by_rows.items()) if set(layers) == LAYERS}
        if whole:
            rates = [sum(b for _, b, _ in layers) / sum(s for s, _, _ in layers) for layers in whole.values()]
            # More rows never take less time, whatever the clock says.
            shares = np.minimum.accumulate(np.asarray(rates) / device.bandwidth).tolist()
            linear = replace(getattr(device, which), bandwidth=shares[0], measured=tuple(zip(whole, shares)))
            used = [record for layers in whole.values() for _, _, record in layers]
            return replace(device, **{which: linear}), used
    return None


def _draft_attention(device: Device, kernels: Sequence[Record], launch: float) -> Found:
    # (sizes, context) -> (bytes of bf16 KV, seconds, record)
    fastest: dict[tuple[object, ...], tuple[float, float, Record]] = {}
    for record in kernels:
        if record["values"].get("op") == "paged_attention":
            for row in record["values"]["rows"].values():
                kind, sizes = row.get("at", ("", ()))
                if kind.startswith("int4 "):
                    key = (kind, *sizes, row["context"])
                    entry = (float(row["kv_bytes"]), 1e-6 * row["us"], record)
                    fastest[key] = min(fastest.get(key, entry), entry, key=lambda known: known[1])
    if len({nbytes for nbytes, _, _ in fastest.values()}) < 2:
        return None
    nbytes, seconds = (np.asarray([entry[i] for entry in fastest.values()]) for i in (0, 1))
    # Relative errors count: each equation is divided by its seconds.
    (floor, slope), *_ = np.linalg.lstsq(
        np.stack([1 / seconds, nbytes / seconds], axis=1), np.ones_like(seconds), rcond=None
    )
    if slope <= 0:
        return None
    estimate = device.layer_seconds if device.draft_layer_seconds is None else device.draft_layer_seconds
    return (
        replace(
            device,
            draft_attention=float(1 / slope) / (device.bandwidth * device.attention),
            draft_layer_seconds=max(0.0, estimate - launch) + max(0.0, float(floor)),
        ),
        [record for _, _, record in fastest.values()],
    )


# -- steps -----------------------------------------------------------------------------------------------------------


def _cells(records: Iterable[Record]) -> Iterator[_Cell]:
    shapes = {f"layer sizes of {name}": shape for name, shape in MODELS.values()}
    for record in records:
        values = record["values"]
        for text, shape in shapes.items():
            if record["status"] == PASSED and str(values["model"]).endswith(text):
                step = {
                    (arm, int(gamma)): 1e-3 * ms
                    for arm, facts in values["arms"].items()
                    for gamma, ms in facts["step_ms"].items()
                }
                yield _Cell(record, shape, values["batch"], values["context"] + values["output"] / 2, step)


def _attention(device: Device, cells: Sequence[_Cell]) -> Found:
    """Of the two cells of a batch that are the farthest apart in bytes."""
    pairs = [
        (second.batch * (second.context - first.context), first, second)
        for first in cells
        for second in cells
        if first.batch == second.batch and first.shape == second.shape and first.context < second.context
        if ("plain", 0) in first.step and ("plain", 0) in second.step
    ]
    if not pairs:
        return None
    tokens, first, second = max(pairs, key=lambda pair: pair[0])
    seconds = second.step["plain", 0] - first.step["plain", 0]
    if seconds <= 0:
        return None
    shape = second.shape
    rate = tokens * 2 * shape.layers * shape.kv_heads * shape.head_dim * BF16_BYTES / seconds
    share = rate / device.bandwidth
    # The draft keeps its own bytes per second.
    draft = device.draft_attention * device.attention / share
    return replace(device, attention=share, draft_attention=draft), [first.record, second.record]


def _layer(device: Device, cells: Sequence[_Cell]) -> Found:
    """Of the smallest cell: there the fixed part weighs most."""
    for cell in cells:
        if ("plain", 0) in cell.step:
            bare = RooflineCosts(replace(device, layer_seconds=0.0), "", cell.shape).plain(cell.batch, cell.context)
            fixed = max(0.0, cell.step["plain", 0] - bare) / cell.shape.layers
            draft = device.layer_seconds if device.draft_layer_seconds is None else device.draft_layer_seconds
            return replace(device, layer_seconds=fixed, draft_layer_seconds=draft), [cell.record]
    return None


def _fixed(cells: Sequence[_Cell]) -> Iterator[tuple[_Cell, float, float]]:
    """Cells with steps of both draft lengths, and their seconds."""
    few, many = GAMMAS
    for cell in cells:
        short, long = cell.step.get((f"fixed:{few}", few)), cell.step.get((f"fixed:{many}", many))
        if short is not None and long is not None:
            yield cell, short, long


def _draft_layer(device: Device, cells: Sequence[_Cell]) -> Found:
    few, many = GAMMAS
    for cell, short, long in _fixed(cells):
        bare = RooflineCosts(replace(device, draft_layer_seconds=0.0), "", cell.shape)
        wider = bare.verify(cell.batch, cell.context, many) - bare.verify(cell.batch, cell.context, few)
        draft = (long - short - wider) / (many - few)
        fixed = max(0.0, draft - bare.draft(cell.batch, cell.context)) / cell.shape.layers
        return replace(device, draft_layer_seconds=fixed), [cell.record]
    return None


def _verify(device: Device, cells: Sequence[_Cell]) -> Found:
    few, _ = GAMMAS
    for cell, short, _long in _fixed(cells):
        bare = RooflineCosts(replace(device, verify_seconds=0.0), "", cell.shape)
        rest = bare.verify(cell.batch, cell.context, few) + few * bare.draft(cell.batch, cell.context)
        return replace(device, verify_seconds=max(0.0, short - rest)), [cell.record]
    return None
