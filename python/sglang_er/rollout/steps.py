"""The engine's own counters, and what happened between two looks at them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

Key = TypeVar("Key")


@dataclass(frozen=True)
class Steps:
    """What the engine did between two looks at its counters, which are totals since its start.

    `drafted_at`, `accepted_at`: drafts verified and accepted, by offset. `cost_steps`, `cost_seconds`: decode steps and
    their time by (batch size, gamma).
    """

    steps_by_gamma: dict[int, int]
    request_steps: int
    committed_tokens: int
    accepted_drafts: int
    speculating_request_steps: int
    drafted_at: dict[int, int] = field(default_factory=dict)
    accepted_at: dict[int, int] = field(default_factory=dict)
    cost_steps: dict[tuple[int, int], int] = field(default_factory=dict)
    cost_seconds: dict[tuple[int, int], float] = field(default_factory=dict)

    @staticmethod
    def total(state: Mapping[str, Any]) -> Steps:
        """The counters in the reply of GET /er/state."""
        steps = state["steps"]
        costs = {
            (int(size), int(gamma)): cost
            for size, by_gamma in steps.get("costs", {}).items()
            for gamma, cost in by_gamma.items()
        }
        return Steps(
            {int(gamma): int(count) for gamma, count in steps["steps_by_gamma"].items()},
            int(steps["request_steps"]),
            int(steps["committed_tokens"]),
            int(steps["accepted_drafts"]),
            int(steps["speculating_request_steps"]),
            dict(enumerate(steps.get("drafted_at", []))),
            dict(enumerate(steps.get("accepted_at", []))),
            {key: int(cost["steps"]) for key, cost in costs.items()},
            {key: float(cost["seconds"]) for key, cost in costs.items()},
        )

    @staticmethod
    def none() -> Steps:
        """Nothing happened: what a sum starts from."""
        return Steps({}, 0, 0, 0, 0)

    def since(self, earlier: Steps) -> Steps:
        return self._with(earlier, -1)

    def __add__(self, other: Steps) -> Steps:
        return self._with(other, 1)

    def _with(self, other: Steps, sign: int) -> Steps:
        values: dict[str, Any] = {}
        for entry in fields(Steps):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            values[entry.name] = _added(mine, theirs, sign) if isinstance(mine, dict) else mine + sign * theirs
        return Steps(**values)

    @property
    def accept_length(self) -> float | None:
        """Tokens per request and step that drafted, the bonus token included; None if no step did."""
        drafting = self.speculating_request_steps
        return (self.accepted_drafts + drafting) / drafting if drafting else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens per request and step, plain steps included."""
        return self.committed_tokens / self.request_steps if self.request_steps else None

    @property
    def alpha(self) -> float | None:
        """Share of the verified drafts that were accepted, whatever their offset; None if there were none."""
        drafted = sum(self.drafted_at.values())
        return sum(self.accepted_at.values()) / drafted if drafted else None

    @property
    def alpha_by_offset(self) -> list[float]:
        return [self.accepted_at.get(offset, 0) / count for offset, count in sorted(self.drafted_at.items())]

    @property
    def costs(self) -> dict[tuple[int, int], tuple[int, float]]:
        """Steps and seconds by (batch size, gamma)."""
        return {key: (count, self.cost_seconds.get(key, 0.0)) for key, count in self.cost_steps.items()}


def _added(mine: Mapping[Key, float], other: Mapping[Key, float], sign: int) -> dict[Key, float]:
    """Key by key, without the keys that did not occur."""
    total: Counter[Key] = Counter(mine)  # type: ignore[arg-type]
    for key, value in other.items():
        total[key] += sign * value  # type: ignore[assignment]
    return {key: value for key, value in sorted(total.items()) if value}  # type: ignore[type-var]
