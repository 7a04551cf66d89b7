"""The tables and the JSON of `sglang-er bench kernels`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_er.bench.kernels import Results
from sglang_er.bench.linear import Cell
from sglang_er.rollout.report import table


@dataclass(frozen=True)
class Row:
    """A line of what was promised: the figure of a whole forward pass, and the worst of its parts."""

    what: str
    promised: float
    measured: float
    worst: float
    unit: str


def reads(results: Results) -> list[float]:
    """Every read bandwidth of the run, in bytes per second."""
    cells = [cell.read for cells in results.linear.values() for cell in cells]
    every = [*(b.read for b in results.bandwidth), *cells, *(found.read for found in results.attention)]
    return list(dict.fromkeys(every))  # the cells of one turn share theirs


def pass_seconds(cells: Sequence[Cell], op: str, batch: int) -> float:
    """All linear layers of a forward pass."""
    return sum(cell.seconds * cell.layer.count for cell in cells if (cell.op, cell.batch) == (op, batch))


def summary(results: Results) -> list[Row]:
    """The promises that this run has figures for."""
    rows: list[Row] = []
    for model, cells in results.linear.items():
        found = {(cell.op, cell.batch, cell.layer.name): cell for cell in cells}
        layers = list(dict.fromkeys(cell.layer.name for cell in cells))
        for op in ("bf16_linear", "w4a8_linear"):
            ones = [found[op, 1, layer] for layer in layers if (op, 1, layer) in found]
            if ones:
                ideal = sum(cell.bytes / cell.read * cell.layer.count for cell in ones)
                whole = ideal / pass_seconds(cells, op, 1)
                rows.append(Row(f"{model} {op}, M=1", 0.85, whole, min(c.share for c in ones), "of read bandwidth"))
        for batch, promised in ((8, 2.7), (32, 1.8)):
            pairs = [(found.get(("bf16_linear", batch, x)), found.get(("w4a8_linear", batch, x))) for x in layers]
            both = [(plain, quantized) for plain, quantized in pairs if plain is not None and quantized is not None]
            if both:
                whole = pass_seconds(cells, "bf16_linear", batch) / pass_seconds(cells, "w4a8_linear", batch)
                worst = min(plain.seconds / quantized.seconds for plain, quantized in both)
                rows.append(Row(f"{model} w4a8_linear, M={batch}", promised, whole, worst, "x bf16_linear"))
    for model, packed in results.packing.items():
        moved = sum(entry.rate * entry.seconds * entry.layer.count for entry in packed)
        seconds = sum(entry.seconds * entry.layer.count for entry in packed)
        copied = sum(entry.rate * entry.seconds * entry.layer.count / entry.copy_rate for entry in packed)
        whole = (moved / seconds) / (moved / copied)
        rows.append(Row(f"{model} quantize_pack", 0.6, whole, min(entry.share for entry in packed), "of a copy"))
    rows += _attention_rows(results)
    return rows


def _attention_rows(results: Results) -> list[Row]:
    rows = []
    longest = max((found.context for found in results.attention), default=0)
    chosen = [found for found in results.attention if found.context == longest and found.queries == 1]
    for name, promised in (("int8", 1.5), ("int4", 2.0)):
        ratios = [found.speed_up(name) for found in chosen if name in found.seconds]
        if ratios:
            what = f"attention over {name}, context {longest}"
            rows.append(Row(what, promised, statistics.median(ratios), min(ratios), "x bf16"))
    return rows


def to_json(results: Results, about: Mapping[str, Any]) -> dict[str, Any]:
    """docs/benchmarking.md explains the fields."""
    return {
        "what": "kernels",
        **about,
        "bandwidth": {
            "read": statistics.median(reads(results)),
            "read_lowest": min(reads(results)),
            "read_highest": max(reads(results)),
            "copy": statistics.median(bandwidth.copy for bandwidth in results.bandwidth),
        },
        "summary": [asdict(row) for row in summary(results)],
        "linear": [
            {"model": model, **_flat(asdict(cell)), "share": round(cell.share, 4)}
            for model, cells in results.linear.items()
            for cell in cells
        ],
        "quantize_pack": [
            {"model": model, **_flat(asdict(entry)), "share": round(entry.share, 4)}
            for model, packed in results.packing.items()
            for entry in packed
        ],
        "attention": [asdict(found) for found in results.attention],
        "call_overhead_seconds": results.overhead,
    }


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    layer = entry.pop("layer")
    return {"layer": layer["name"], "n": layer["rows"], "k": layer["cols"], "count": layer["count"], **entry}


def text(results: Results, about: Mapping[str, Any]) -> str:
    machine, read = about["machine"], reads(results)
    copied = statistics.median(bandwidth.copy for bandwidth in results.bandwidth)
    load = " ".join(f"{value:.1f}" for value in machine["load_before"])
    lines = [
        f"machine  {machine['cpu']}, {about['threads']} threads, {', '.join(about['isas'])}, load {load}",
        f"memory   {statistics.median(read) / 1e9:.1f} GB/s read (median of {len(read)}, between "
        f"{min(read) / 1e9:.1f} and {max(read) / 1e9:.1f}), {copied / 1e9:.1f} copied",
        f"made by  {about['command']} ({about['version']}, commit {about['commit'] or 'unknown'}, {about['date']})",
    ]
    for model, cells in results.linear.items():
        for batch in dict.fromkeys(cell.batch for cell in cells):
            lines += ["", *_linear_table(model, batch, [cell for cell in cells if cell.batch == batch])]
    if results.attention:
        lines += ["", *_attention_table(results)]
    if results.overhead:
        shown = ", ".join(f"{op} {seconds * 1e6:.1f}" for op, seconds in results.overhead.items())
        lines += ["", f"a call itself, us: {shown}"]
    rows = [("", "promised", "whole pass", "worst", "")]
    rows += [(r.what, f"{r.promised:.2f}", f"{r.measured:.2f}", f"{r.worst:.2f}", r.unit) for r in summary(results)]
    return "\n".join([*lines, "", *table(rows)])


def _linear_table(model: str, batch: int, cells: Sequence[Cell]) -> list[str]:
    """Microseconds and, in parentheses, the share of the read bandwidth."""
    ops = list(dict.fromkeys(cell.op for cell in cells))
    layers = {cell.layer.name: cell.layer for cell in cells}
    found = {(cell.op, cell.layer.name): cell for cell in cells}
    rows = [(f"{model} M={batch}, us (share)".strip(), *ops)]
    for name, layer in layers.items():
        shown = [found.get((op, name)) for op in ops]
        rows.append(
            (f"{name} {layer.rows}x{layer.cols}",
             *("-" if c is None else f"{c.seconds * 1e6:.0f} ({c.share:.2f})" for c in shown))
        )  # fmt: skip
    whole = [pass_seconds(cells, op, batch) if all((op, name) in found for name in layers) else None for op in ops]
    rows.append(("whole pass", *("-" if value is None else f"{value * 1e6:.0f}" for value in whole)))
    return table(rows)


def _attention_table(results: Results) -> list[str]:
    names = list(dict.fromkeys(name for found in results.attention for name in found.seconds))
    rows = [("attention, us (over bf16)", *names)]
    for found in results.attention:
        heads = found.heads
        label = f"{heads.query}x{heads.kv}x{heads.dim}, context {found.context}, {found.queries} new"
        cells = (
            f"{found.seconds[n] * 1e6:.0f} ({found.speed_up(n):.2f})" if n in found.seconds else "-" for n in names
        )
        rows.append((label, *cells))
    return table(rows)
