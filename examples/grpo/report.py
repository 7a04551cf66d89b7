"""report.html, curves.png, timing.png and study.json from what the stages wrote."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo import fixed_policy
from grpo.settings import ARMS
from grpo.trend import Slope, slope

Records = list[dict[str, Any]]

#: Field of a step's record -> (title, arms that have it).
CURVES = {
    "reward": "reward",
    "entropy": "entropy, nats a token",
    "kl": "KL(rollout logprobs, trainer's), nats a token",
    "length": "response length, tokens",
    "accept_length": "accept length (4 drafts a step)",
    "seconds": "seconds of a step (tiny model)",
}
COLOURS = {"plain": "#555555", "speculation": "#1f6fb4", "frozen": "#d1602a"}


def load_runs(folder: Path) -> dict[str, list[Records]]:
    """Arm -> its runs, by seed."""
    found: dict[str, list[Records]] = {}
    for arm in ARMS:
        for path in sorted(folder.glob(f"{arm}_*/steps.jsonl")):
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for record in records:
                record["seconds"] = record["rollout_seconds"] + record["train_seconds"] + record["sync_seconds"]
            found.setdefault(arm, []).append(records)
    return found


def values_of(runs: Sequence[Records], name: str) -> list[list[float]]:
    return [[record[name] for record in records if record[name] is not None] for records in runs]


def trends(runs: Mapping[str, Sequence[Records]]) -> dict[str, dict[str, Slope]]:
    """Arm -> field -> its slope a step over all seeds."""
    found: dict[str, dict[str, Slope]] = {}
    for arm, several in runs.items():
        for name in ("reward", "entropy", "accept_length"):
            columns = values_of(several, name)
            if all(len(column) > 2 for column in columns):
                found.setdefault(arm, {})[name] = slope(columns)
    return found


def first_and_last(runs: Sequence[Records], name: str, steps: int = 5) -> tuple[float, float]:
    """Means over all seeds of the first and of the last `steps` steps."""
    columns = values_of(runs, name)
    ends = [
        [value for column in columns for value in part(column)] for part in (lambda c: c[:steps], lambda c: c[-steps:])
    ]
    return sum(ends[0]) / len(ends[0]), sum(ends[1]) / len(ends[1])


def draw_curves(runs: Mapping[str, Sequence[Records]], path: Path) -> None:
    """Mean over seeds, and every seed as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
    for axes, (name, title) in zip(grid.ravel(), CURVES.items()):
        for arm, several in runs.items():
            columns = [column for column in values_of(several, name) if column]
            if not columns:
                continue
            for column in columns:
                axes.plot(range(1, len(column) + 1), column, color=COLOURS[arm], alpha=0.25, linewidth=0.8)
            mean = [sum(row) / len(row) for row in zip(*columns)]
            axes.plot(range(1, len(mean) + 1), mean, color=COLOURS[arm], linewidth=1.8, label=arm)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if name == "kl":
            axes.set_yscale("log")
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=95)
    pyplot.close(figure)


def draw_timing(timing: Mapping[str, Any], path: Path) -> None:
    """Seconds of a step in both modes, by part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    means = timing["summary"]["mean_seconds"]
    figure, axes = pyplot.subplots(figsize=(7, 2.2), layout="constrained")
    for mode in ("speculation", "plain"):
        parts = {
            "rollout": means[f"rollout, {mode}"],
            "requantization": means["requantization"] if mode == "speculation" else 0.0,
            "training and transfer": means["training and transfer"],
        }
        start = 0.0
        for (name, seconds), colour in zip(parts.items(), ("#1f6fb4", "#d1602a", "#999999")):
            label = name if mode == "speculation" else None
            axes.barh(mode, seconds, left=start, color=colour, label=label)
            start += seconds
    axes.set_xlabel("seconds a step, 0.5b shape")
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.3))
    figure.savefig(path, dpi=95)
    pyplot.close(figure)


def write(out: Path) -> None:
    """Raises ValueError where no run is there."""
    runs = load_runs(out / "runs")
    if not runs:
        raise ValueError(f"{out / 'runs'} holds no run: let the other stages go first")
    found = {name: _read(out / f"{name}.json") for name in ("runs", "fixed_policy", "timing")}
    slopes = trends(runs)
    draw_curves(runs, out / "curves.png")
    if found["timing"]:
        draw_timing(found["timing"], out / "timing.png")
    summary = {
        "slopes_per_step": {arm: {name: asdict(one) for name, one in row.items()} for arm, row in slopes.items()},
        "first_and_last_five_steps": {
            arm: {name: first_and_last(several, name) for name in CURVES if any(values_of(several, name))}
            for arm, several in runs.items()
        },
        "runs": {arm: [[_short(record) for record in one] for one in several] for arm, several in runs.items()},
        **{f"{name}_measured": _where(one) for name, one in found.items() if one},
    }
    (out / "study.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")
    (out / "report.html").write_text("\n".join(page(runs, slopes, found)) + "\n", encoding="utf-8")


def page(
    runs: Mapping[str, Sequence[Records]], slopes: Mapping[str, Mapping[str, Slope]], found: Mapping[str, Any]
) -> Iterable[str]:
    """The report's lines."""
    yield '<!doctype html><html lang="en"><meta charset="utf-8"><title>GRPO with and without speculation</title>'
    yield (
        "<style>body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%}small{color:#666}</style>"
    )
    yield "<h1>GRPO with and without speculation</h1>"
    if found["runs"]:
        yield f"<p><small>{html.escape(_machine_line(found['runs']))}</small></p>"
    seeds = max(len(several) for several in runs.values())
    yield f"<h2>Curves, {seeds} seeds an arm</h2><p>They illustrate; the claim is the test below.</p>"
    yield '<p><img src="curves.png" alt="reward, entropy, KL, length, accept length, seconds over steps"></p>'
    yield "<table><tr><th>arm<th>reward, first and last five steps<th>its slope<th>slope of the accept length</tr>"
    for arm, several in runs.items():
        first, last = first_and_last(several, "reward")
        row = slopes.get(arm, {})
        cells = [row[name].text() if name in row else "–" for name in ("reward", "accept_length")]
        yield f"<tr><td>{arm}<td>{first:.3f} → {last:.3f}<td>{cells[0]}<td>{cells[1]}</tr>"
    yield "</table><p><small>Slopes a step, with 95 % intervals; each seed has a level of its own.</small></p>"
    if found["fixed_policy"]:
        yield from _test_section(found["fixed_policy"])
    if found["timing"]:
        yield from _timing_section(found["timing"])
    yield "</html>"


def _test_section(test: Mapping[str, Any]) -> Iterable[str]:
    verdict = "passes" if test["passes"] else "FAILS"
    yield f"<h2>Fixed-policy test: {verdict} at family-wise {test['level']:.0%}</h2>"
    yield f"<p><small>{html.escape(_machine_line(test))}</small></p>"
    yield "<table><tr><th>policy<th>rollouts a side<th>alpha" + "".join(
        f"<th>{name}, p" for name in fixed_policy.STATISTICS
    )
    for where, row in test["p"].items():
        side = test["sides"].get(where, {}).get("speculation") or test["sides"]["stale twin, right verifier"]
        yield f"<tr><td>{where}<td>{side['rollouts']}<td>{side['alpha']:.3f}" + _cells(row)
    yield "</table><p>All of these together, by Holm's procedure: smallest adjusted p "
    yield f"{min(test['adjusted_p'].values()):.3g}. Broken verifiers, which the same test must reject:</p>"
    yield "<table><tr><th>verifier<th>verdict<th>adjusted p" + "".join(
        f"<th>{name}, p" for name in fixed_policy.STATISTICS
    )
    for broken, row in test["broken_p"].items():
        seen = "rejected" if test["broken_rejected"][broken] else "not seen"
        yield f"<tr><td>{broken}<td>{seen}<td>{test['broken_adjusted_p'][broken]:.3g}" + _cells(row)
    yield "</table>"


def _timing_section(timing: Mapping[str, Any]) -> Iterable[str]:
    summary = timing["summary"]
    yield "<h2>Seconds of a step at the 0.5b shape</h2>"
    yield f"<p><small>{html.escape(_machine_line(timing))}</small></p>"
    yield '<p><img src="timing.png" alt="seconds of a step by part"></p>'
    yield "<table><tr><th>speculation over plain<th>ratio<th>95 %</tr>"
    for name, one in summary["ratio"].items():
        yield f"<tr><td>{name}<td>{one['value']:.3f}<td>{one['low']:.3f} to {one['high']:.3f}</tr>"
    yield f"</table><p>Accept length {summary['accept_length']:.2f}. Seconds, means:</p><table>"
    for name, seconds in summary["mean_seconds"].items():
        yield f"<tr><td>{name}<td>{seconds:.2f}</tr>"
    yield "</table>"


def _cells(row: Mapping[str, float]) -> str:
    return "".join(f"<td>{row[name]:.3g}" for name in fixed_policy.STATISTICS) + "</tr>"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _where(one: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one[name] for name in ("command", "date", "commit", "machine")}


def _machine_line(one: Mapping[str, Any]) -> str:
    place = one["machine"]
    return (
        f"{place['cpu']}, {place['cores']} cores, load {place['load_before'][0]} before and {place['load_after'][0]} "
        f"after; {one['date']}; {one['command']}; commit {one['commit']}"
    )


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in record.items()}
