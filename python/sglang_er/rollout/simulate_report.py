"""What a simulation ends in: a table to read and JSON to keep."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_er.rollout import speedup
from sglang_er.rollout.experiment import Plan, Sample, Samples, against
from sglang_er.rollout.intervals import MeanInterval, mean_interval
from sglang_er.rollout.report import table

SHOWN = 5  # draft lengths in the table's histogram


def text(plan: Plan, samples: Samples, gains: Mapping[str, Any] | None) -> str:
    lines = [*_head(plan, samples), *_constants(plan), ""]
    header = ("policy", "makespan s", "saved vs ar", "vs oracle", "tokens/s", "latency s", "accept", "steps by gamma")
    rows = [_row(samples, name) for name in samples]
    lines += table([header, *rows])
    notes = ["", f"makespan: mean of {plan.seeds} seeds and its 95 % interval; saved: paired by seed."]
    if plan.rollouts > 1:
        notes.append(f"A seed is {plan.rollouts} rollouts in a row; seconds are per rollout.")
    lines += notes
    if gains is not None:
        lines += ["", *gains_text(gains)]
    return "\n".join(lines)


def _head(plan: Plan, samples: Samples) -> list[str]:
    acceptance = plan.acceptance
    mean = "from a file" if isinstance(acceptance.mean, tuple) else f"{acceptance.mean:g}"
    change = "" if acceptance.change is None else f", {acceptance.change[0]:g} after {acceptance.change[1]:.0%}"
    tokens = statistics.fmean(sample.tokens for sample in samples["ar"]) / plan.rollouts
    requests = statistics.fmean(len(sample.latencies) for sample in samples["ar"]) / plan.rollouts
    return [
        f"costs      {plan.table.costs.name}, draft length up to {plan.table.gamma_max}",
        f"work       {requests:.0f} requests, {tokens / requests:.0f} tokens each on average ({plan.lengths.text}), "
        f"prompt {plan.prompt}, {plan.arrivals.text()}, at most {plan.engine.max_running} at once",
        f"alpha      {mean}{change}, concentration {acceptance.concentration:g}",
    ]


def _constants(plan: Plan) -> list[str]:
    known = plan.table.constants
    rows = [(f"{constant.name}:", constant.value, constant.source) for constant in known]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else []
    titles = ["constants", *[""] * len(rows)]
    return [
        f"{title:11}{name:{widths[0]}} {value:{widths[1]}}  {source}"
        for title, (name, value, source) in zip(titles, rows)
    ]


def _row(samples: Samples, name: str) -> tuple[str, ...]:
    mine = samples[name]
    makespan = mean_interval([sample.makespan for sample in mine])
    rate = statistics.fmean(sample.tokens / sample.busy for sample in mine)
    latency = statistics.fmean(statistics.fmean(sample.latencies) for sample in mine)
    return (
        name,
        _seconds(makespan),
        "-" if name == "ar" else _percent(against(samples, name, "ar").saved),
        "-" if name == "oracle" else _percent(against(samples, name, "oracle").saved),
        f"{rate:.0f}",
        f"{latency:.2f}",
        _optional(accept_length(mine), ".2f"),
        _histogram(_shares(mine)),
    )


def _seconds(value: MeanInterval) -> str:
    return f"{value.mean:.2f}" if value.low is None else f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _percent(value: MeanInterval) -> str:
    if value.low is None or value.high is None:
        return f"{100 * value.mean:+.1f} %"
    return f"{100 * value.mean:+.1f} % ±{50 * (value.high - value.low):.1f}"


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _histogram(shares: Mapping[int, float]) -> str:
    """The most frequent ones; the JSON has all."""
    shown = sorted(sorted(shares, key=lambda gamma: -shares[gamma])[:SHOWN])
    return "  ".join(f"{gamma}: {shares[gamma]:.0%}" for gamma in shown) + (" ..." if len(shares) > SHOWN else "")


def _shares(samples: Sequence[Sample]) -> dict[int, float]:
    """Of all steps, by draft length."""
    steps: Counter[int] = Counter()
    for sample in samples:
        steps.update(sample.steps)
    return {gamma: count / steps.total() for gamma, count in sorted(steps.items())}


def accept_length(samples: Sequence[Sample]) -> float | None:
    """Tokens per request and step that drafted."""
    drafting = sum(sample.drafting for sample in samples)
    return sum(sample.accepted for sample in samples) / drafting if drafting else None


def gains_text(gains: Mapping[str, Any]) -> list[str]:
    """`gains`: `speedup.to_json`."""
    rows = [("batch", "plain ms", "draft ms", "verify ms", "best gamma", "speed-up")]
    rows += [
        (
            str(row["batch"]),
            f"{row['plain_ms']:.2f}",
            f"{row['draft_ms']:.2f}",
            f"{row['verify_ms']:.2f}",
            str(row["best_gamma"]),
            f"{row['speed_up']:.2f}",
        )
        for row in gains["batches"]
    ]
    even = gains["break_even_batch"]
    last = f"Drafting gains up to a batch of {even}." if even else "Drafting never gains."
    return [f"best draft length at context {gains['context']}, alpha {gains['alpha']:g}", *table(rows), last]


def to_json(plan: Plan, samples: Samples, gains: Mapping[str, Any] | None, about: Mapping[str, Any]) -> dict[str, Any]:
    acceptance, engine = plan.acceptance, plan.engine
    return {
        **about,
        "costs": {
            "name": plan.table.costs.name,
            "gamma_max": plan.table.gamma_max,
            "constants": [constant._asdict() for constant in plan.table.constants],
        },
        "workload": {
            "lengths": plan.lengths.text,
            "requests": plan.requests,
            "prompt": plan.prompt,
            "arrivals": plan.arrivals.text(),
            "think_seconds": plan.arrivals.think_seconds,
            "turn_tokens": plan.arrivals.turn_tokens,
            "seeds": plan.seeds,
            "rollouts": plan.rollouts,
        },
        "acceptance": {
            "mean": acceptance.mean,
            "concentration": acceptance.concentration,
            "decay": acceptance.decay,
            "offset_decay": acceptance.offset_decay,
            "change": acceptance.change,
        },
        "engine": {
            "max_running": engine.max_running,
            "prefill_tokens_per_second": engine.prefill_rate,
            "late_steps": engine.late,
            "noise": engine.noise,
            "outliers": engine.outliers,
            "draft_pass_timed": engine.split,
        },
        "policies": {name: _policy_json(samples, name) for name in samples},
        "best_gamma": gains,
    }


def _policy_json(samples: Samples, name: str) -> dict[str, Any]:
    mine = samples[name]
    seconds: dict[int, float] = {}
    by_batch: dict[int, list[int]] = {}
    for sample in mine:
        for gamma, part in sample.seconds.items():
            seconds[gamma] = seconds.get(gamma, 0.0) + part
        for top, (steps, total) in sample.by_batch.items():
            before = by_batch.get(top, [0, 0])
            by_batch[top] = [before[0] + steps, before[1] + total]
    everything = sum(seconds.values())
    compared = {other: against(samples, name, other) for other in ("ar", "oracle") if other != name}
    return {
        "makespan_s": mean_interval([sample.makespan for sample in mine]).to_json(),
        "busy_s": mean_interval([sample.busy / len(sample.makespans) for sample in mine]).to_json(),
        "tokens_per_s": mean_interval([sample.tokens / sample.busy for sample in mine]).to_json(),
        "latency_s": mean_interval([statistics.fmean(sample.latencies) for sample in mine]).to_json(),
        "against": {
            other: {"seconds": found.seconds.to_json(), "saved": found.saved.to_json()}
            for other, found in compared.items()
        },
        "accept_length": accept_length(mine),
        "gamma_histogram": {str(gamma): round(share, 6) for gamma, share in _shares(mine).items()},
        "gamma_seconds": {str(gamma): round(part / everything, 6) for gamma, part in sorted(seconds.items())},
        "gamma_by_batch": {str(top): round(total / steps, 3) for top, (steps, total) in sorted(by_batch.items())},
        "tokens": [sample.tokens for sample in mine],
        "makespans_s": [[round(value, 6) for value in sample.makespans] for sample in mine],
        "described": mine[0].described,
        "timeline": [row._asdict() for row in mine[0].timeline],
    }


def gains_of(plan: Plan, context: int) -> dict[str, object] | None:
    """None where there is no one alpha."""
    if isinstance(plan.acceptance.mean, tuple):
        return None
    limit = min(plan.table.costs.batch_max, max(speedup.BATCHES))
    return speedup.to_json(plan.table, context, plan.acceptance.mean, limit)
