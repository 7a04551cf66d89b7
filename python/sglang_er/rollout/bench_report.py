"""The table and the JSON of `sglang-er bench rollout`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_er.rollout import report
from sglang_er.rollout.bench import Result, probe_sizes
from sglang_er.rollout.intervals import Interval, median_interval
from sglang_er.rollout.measure import Block
from sglang_er.rollout.oracle import CostModel, Saving

# Below this many blocks the bounds of an interval say little.
ENOUGH_BLOCKS = 20


def speed_up(result: Result) -> Interval:
    return median_interval(result.comparison.speed_ups)


def makespan_quotient(result: Result) -> Interval:
    """Plain over speculative seconds until the last response."""
    pairs = zip(result.comparison.plain, result.comparison.speculative, strict=True)
    return median_interval([plain.seconds / speculative.seconds for plain, speculative in pairs])


def median_seconds(blocks: Sequence[Block]) -> float:
    return statistics.median(block.seconds for block in blocks)


def to_json(result: Result, about: Mapping[str, Any]) -> dict[str, Any]:
    """docs/benchmarking.md explains the fields. `about`: model, machine and provenance."""
    settings, comparison = result.settings, result.comparison
    steps = result.drafting_steps()
    saving = result.saving()
    outputs = [request.output_tokens for batch in settings.batches for request in batch]
    return {
        "what": "rollout",
        **about,
        "workload": {
            "requests": [len(batch) for batch in settings.batches],
            "at_once": settings.at_once,
            "input_tokens": len(settings.batches[0][0].input_ids),
            "output_tokens": {
                "shortest": min(outputs),
                "median": statistics.median(outputs),
                "longest": max(outputs),
            },
            "temperature": settings.temperature,
            "prefix_cache": "emptied before every block" if settings.cold else "holds all prompts",
        },
        "policy": dict(result.policy),
        "pairs": len(comparison.plain),
        "speed_up": _interval(speed_up(result)),
        "cpu_speed_up": comparison.cpu_speed_up,
        "tokens_per_second": {name: report.median_rate(blocks) for name, blocks in _arms(result).items()},
        "makespan_seconds": {
            **{name: median_seconds(blocks) for name, blocks in _arms(result).items()},
            "quotient": _interval(makespan_quotient(result)),
        },
        "accept_length": report.all_steps(comparison.speculative).accept_length,
        "alpha": {"measured": steps.alpha, "by_offset": [round(value, 4) for value in steps.alpha_by_offset]},
        "gamma_histogram": dict(report.all_steps(comparison.speculative).steps_by_gamma),
        "oracle": None if saving is None else _saving(saving),
        "costs": _costs(result),
        "blocks": {name: [_block(block) for block in blocks] for name, blocks in _arms(result).items()},
        "timeline": _timeline(result),
    }


def _arms(result: Result) -> dict[str, list[Block]]:
    return {"plain": result.comparison.plain, "speculative": result.comparison.speculative}


def _interval(value: Interval) -> dict[str, float]:
    return {"median": round(value.median, 4), "low": round(value.low, 4), "high": round(value.high, 4)}


def _block(block: Block) -> dict[str, Any]:
    return {
        "seconds": round(block.seconds, 4),
        "cpu_seconds": round(block.cpu_seconds, 3),
        "tokens": block.tokens,
        "tokens_per_second": round(block.tokens_per_second, 3),
        "accept_length": block.steps.accept_length,
        "alpha": block.steps.alpha,
        "steps_by_gamma": block.steps.steps_by_gamma,
    }


def _saving(saving: Saving) -> dict[str, Any]:
    return {
        "share": saving.share,
        "achieved_seconds": saving.achieved,
        "possible_seconds": saving.possible,
        "plain_seconds": saving.plain,
        "policy_seconds": saving.policy,
        "plain_seconds_computed": saving.plain_computed,
        "oracle_seconds_computed": saving.oracle_computed,
        "gamma_by_batch_size": saving.gammas,
    }


def _costs(result: Result) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for (size, gamma), (steps, seconds) in sorted(result.all_steps().costs.items()):
        table.setdefault(str(size), {})[str(gamma)] = {"steps": steps, "seconds": round(seconds, 6)}
    return table


def typical_pair(result: Result) -> int:
    """The pair with the median speed-up (the lower one of two)."""
    quotients = result.comparison.speed_ups
    return quotients.index(statistics.median_low(quotients))


def _timeline(result: Result) -> dict[str, Any] | None:
    pair = typical_pair(result)
    if not result.timelines[pair]:
        return None
    columns = ["seconds", "active", "gamma", "tokens_per_second"]
    return {"pair": pair, "columns": columns, **result.timelines[pair]}


def text(result: Result, about: Mapping[str, Any]) -> str:
    """What the user reads."""
    plain, speculative = result.comparison.plain, result.comparison.speculative
    steps = report.all_steps(speculative)
    cpu = result.comparison.cpu_speed_up
    rows = [
        ("", "plain", "speculative"),
        ("tokens/s, median block", f"{report.median_rate(plain):.2f}", f"{report.median_rate(speculative):.2f}"),
        ("makespan, s, median block", *(f"{median_seconds(blocks):.2f}" for blocks in (plain, speculative))),
        ("speed-up, median pair [95 %]", "", speed_up(result).text()),
        ("speed-up in CPU time", "", "-" if cpu is None else f"{cpu:.3f}"),
        ("accept length of drafting steps", "-", report.number(steps.accept_length)),
        ("steps by gamma", report.histogram(report.all_steps(plain)), report.histogram(steps)),
    ]  # fmt: skip
    lines = [*_head(result, about), "", *report.table(rows), "", f"pairs: {_spread(result.comparison.speed_ups)}"]
    saving = result.saving()
    if saving is not None:
        lines += ["", *_saving_text(saving), *_cost_text(result)]
    elif result.settings.probe:
        lines += ["", "oracle: the costs of some batch size are unknown, no figure"]
    if result.settings.blocks < ENOUGH_BLOCKS:
        lines.append(
            f"{result.settings.blocks} blocks are few: {ENOUGH_BLOCKS} or more make the interval mean something."
        )
    return "\n".join(lines)


def _head(result: Result, about: Mapping[str, Any]) -> list[str]:
    settings, model = result.settings, about["model"]
    outputs = [request.output_tokens for batch in settings.batches for request in batch]
    lengths = f"{outputs[0]}" if min(outputs) == max(outputs) else (
        f"{min(outputs)} to {max(outputs)} (median {statistics.median(outputs):.0f})"
    )  # fmt: skip
    alphas = [
        "unknown" if value is None else f"{value:.3f}"
        for value in (model["alpha_stated"], result.drafting_steps().alpha)
    ]
    batches = f"{len(settings.batches)} seeds of {len(settings.batches[0])} requests"
    return [
        f"model      {model['name']}; alpha stated by its card {alphas[0]}, measured {alphas[1]}",
        report.machine_line(about),
        f"workload   {settings.at_once} in flight, {batches}, "
        f"{len(settings.batches[0][0].input_ids)} tokens in, {lengths} out, temperature {settings.temperature:g}",
        f"blocks     {len(result.comparison.plain)} plain, {len(result.comparison.speculative)} speculative, in turn",
        f"policy     {report.policy_text(result.policy)}",
        report.origin_line(about),
    ]


def _spread(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _saving_text(saving: Saving) -> list[str]:
    share = "nothing to save" if saving.share is None else f"{saving.share:.0%} of the oracle's"
    chosen: list[str] = []
    for size, gamma in saving.gammas.items():
        if not chosen or not chosen[-1].startswith(f"{gamma} "):
            chosen.append(f"{gamma} from {size}")
    return [
        f"makespan saved: {saving.achieved:.1f} of {saving.plain:.1f} s, {share}",
        f"oracle: plain {saving.plain_computed:.1f} s, best {saving.oracle_computed:.1f} s by its costs; "
        f"gamma by requests in flight: {', '.join(chosen)}",
    ]


def _cost_text(result: Result) -> list[str]:
    """Milliseconds of a step at the sizes that were probed."""
    model = CostModel(result.all_steps().costs)
    most = min(result.settings.at_once, len(result.settings.batches[0]))
    rows = [("ms per step, gamma", *map(str, model.gammas()))]
    for size in probe_sizes(most):
        seconds = [model.seconds(size, gamma) for gamma in model.gammas()]
        rows.append((f"{size} requests", *("-" if s is None else f"{s * 1e3:.1f}" for s in seconds)))
    return ["", *report.table(rows)]
