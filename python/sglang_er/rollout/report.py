"""The table that a comparison of plain and speculative decoding ends in."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from sglang_er.rollout.equality import NEAR_TIE_NATS, Equality
from sglang_er.rollout.machine import Machine
from sglang_er.rollout.measure import Block, Comparison
from sglang_er.rollout.steps import Steps
from sglang_er.rollout.workload import Rollout

# A speed-up this close to 1 is called neither faster nor slower.
NOTICEABLE = 0.03


@dataclass(frozen=True)
class Report:
    """Everything that was measured; `text()` is what the user reads."""

    model: str
    alpha: float | None
    machine: Machine
    policy: str
    batch: Sequence[Rollout]
    comparison: Comparison
    equality: Equality

    def text(self) -> str:
        plain, speculative = self.comparison.plain, self.comparison.speculative
        steps = all_steps(speculative)
        cpu_speed_up = self.comparison.cpu_speed_up
        rows = [
            ("", "plain", "speculative"),
            ("tokens/s, median block", f"{median_rate(plain):.1f}", f"{median_rate(speculative):.1f}"),
            ("speed-up, median pair", "", f"{self.comparison.speed_up:.2f}x"),
            ("tokens per CPU second", *(f"{median_cpu_rate(blocks):.1f}" for blocks in (plain, speculative))),
            ("speed-up in CPU time", "", "-" if cpu_speed_up is None else f"{cpu_speed_up:.2f}x"),
            ("accept length (tokens/step)", *(number(all_steps(b).tokens_per_step) for b in (plain, speculative))),
            ("  of steps that drafted", "-", number(steps.accept_length)),
            ("steps by gamma", histogram(all_steps(plain)), histogram(steps)),
            ("rewards, mean", reward(plain), reward(speculative)),
            ("responses cut at their limit", cut(plain), cut(speculative)),
            ("greedy outputs equal", "", yes_or_no(self.equality)),
        ]  # fmt: skip
        lines = [*self._head(), "", *table(rows), "", greedy_text(self.equality), self._verdict()]
        return "\n".join(lines)

    def _head(self) -> list[str]:
        alpha = "not stated by its card" if self.alpha is None else f"{self.alpha:.3f}"
        longest = max(rollout.max_tokens for rollout in self.batch)
        pairs = len(self.comparison.plain)
        return [
            f"model      {self.model}, alpha of a 4-bit draft at temperature 1: {alpha}",
            f"machine    {self.machine.text()}",
            f"workload   {len(self.batch)} rollouts at once, temperature 1, at most {longest} tokens",
            "           half of them through /v1/chat/completions, half through /generate",
            f"blocks     {pairs} plain, {pairs} speculative, alternating in one server",
            f"policy     {self.policy}",
        ]

    def _verdict(self) -> str:
        speed_up = self.comparison.speed_up
        spread = ", ".join(f"{value:.2f}" for value in self.comparison.speed_ups)
        if speed_up < 1 - NOTICEABLE:
            verdict = f"Speculation was SLOWER than plain decoding here: {speed_up:.2f}x (pairs: {spread})."
        elif speed_up <= 1 + NOTICEABLE:
            verdict = f"Speculation made no noticeable difference here: {speed_up:.2f}x (pairs: {spread})."
        else:
            verdict = f"Speculation was {speed_up:.2f} times as fast as plain decoding (pairs: {spread})."
        if self.machine.load[0] > self.machine.cores + 1:
            verdict += (
                f"\nA load average of {self.machine.load[0]:.1f} on {self.machine.cores} cores: other programs "
                "were running, the clock says little and CPU time more."
            )
        return verdict


def yes_or_no(equality: Equality) -> str:
    return "yes" if equality.equal == len(equality.differences) else "no, see below"


def all_steps(blocks: Sequence[Block]) -> Steps:
    return reduce(Steps.__add__, (block.steps for block in blocks))


def median_rate(blocks: Sequence[Block]) -> float:
    return statistics.median(block.tokens_per_second for block in blocks)


def median_cpu_rate(blocks: Sequence[Block]) -> float:
    return statistics.median(block.tokens_per_cpu_second for block in blocks)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def reward(blocks: Sequence[Block]) -> str:
    """Mean over all responses, with the counts: two such means differ by chance."""
    rewards = [value for block in blocks for value in block.rewards]
    return f"{statistics.fmean(rewards):.2f} ({sum(rewards):.0f} of {len(rewards)})"


def cut(blocks: Sequence[Block]) -> str:
    return f"{sum(block.cut for block in blocks)} of {sum(len(block.rewards) for block in blocks)}"


def histogram(steps: Steps) -> str:
    """Shares of steps: `0: 20%  3: 80%`."""
    total = sum(steps.steps_by_gamma.values())
    return "  ".join(f"{gamma}: {count / total:.0%}" for gamma, count in steps.steps_by_gamma.items()) or "-"


def greedy_text(equality: Equality) -> str:
    total = len(equality.differences)
    said = f"Greedy outputs: {equality.equal} of {total} equal token for token ({equality.tokens} tokens)"
    if equality.equal == total:
        return said + "."
    if equality.wrong:
        return (
            f"{said}; {equality.wrong} DIFFER by more than a near tie ({NEAR_TIE_NATS} nats): the outputs are wrong, "
            "please report this."
        )
    gap = equality.largest_gap or 0.0
    return (
        f"{said}; the rest part at a near tie (the two tokens {gap:.3f} nats apart at most), where bf16 rounding of "
        "one-token and several-token passes decides. In fp32 they are equal, `make test` proves it."
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their content, a rule below the first row; the first column to the left, others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def machine_line(about: Mapping[str, Any]) -> str:
    """Of a result's head: what it was measured on."""
    machine = about["machine"]
    loads = [" ".join(f"{value:.1f}" for value in machine[name]) for name in ("load_before", "load_after")]
    return f"machine    {machine['cpu']}, {machine['cores']} cores, load before {loads[0]}, after {loads[1]}"


def origin_line(about: Mapping[str, Any]) -> str:
    """Of a result's head: what made it."""
    return f"made by    {about['command']} ({about['version']}, commit {about['commit'] or 'unknown'}, {about['date']})"


def policy_text(policy: Mapping[str, Any]) -> str:
    """What /er/state says about the policy, as a phrase."""
    if policy.get("policy") == "fixed":
        return f"gamma {policy['gamma']} always"
    if policy.get("policy") == "threshold":
        parts = [f"{gamma} up to {size}" for size, gamma in policy["thresholds"]]
        return f"gamma by batch size: {', '.join(parts)}, 0 above"
    if policy.get("policy") == "goodput":
        return f"gamma by measured cost and acceptance, objective {policy['objective']}"
    return ", ".join(f"{name} {value}" for name, value in policy.items())
