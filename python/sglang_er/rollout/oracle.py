"""What the best draft length per batch size would have given: the yardstick of a policy.

Pure arithmetic on what a run measured. A step over k requests with draft length g costs c(k, g) seconds and commits
E(g) = 1 + a1 + a1 a2 + ... tokens per request, where a_i is the acceptance at offset i. While k requests run, every one
of them takes min over g of c(k, g) / E(g) seconds for a token. The oracle knows costs and acceptance beforehand, not
the chance in every single step.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Steps and seconds by (batch size, gamma).
Costs = Mapping[tuple[int, int], tuple[int, float]]
# Fewer steps than these say nothing about a batch size.
LEAST_STEPS = 3


@dataclass(frozen=True)
class Choice:
    """The best draft length for a batch size, and the seconds that every request then takes for a token."""

    gamma: int
    seconds_per_token: float


def expected_tokens(gamma: int, acceptance: Sequence[float]) -> float:
    """Tokens per request and step. Offsets beyond those measured are accepted as the last one that was."""
    tokens = kept = 1.0
    for offset in range(gamma):
        kept *= acceptance[min(offset, len(acceptance) - 1)] if acceptance else 0.0
        tokens += kept
    return tokens


def rising(points: Sequence[tuple[int, float, float]]) -> list[tuple[int, float]]:
    """(x, y, weight), x rising -> the y's that rise with x and are nearest by weighted squares.

    A step over more requests is never cheaper; without this, the oracle would choose what was measured luckily.
    """
    pools: list[tuple[float, float, list[int]]] = []  # mean, weight, members
    for x, y, weight in points:
        mean, members = y, [x]
        while pools and pools[-1][0] >= mean:
            other, other_weight, other_members = pools.pop()
            mean = (mean * weight + other * other_weight) / (weight + other_weight)
            weight += other_weight
            members = other_members + members
        pools.append((mean, weight, members))
    return [(x, mean) for mean, _, members in pools for x in members]


class CostModel:
    """Seconds per step for any batch size, from steps that were measured at some."""

    def __init__(self, costs: Costs, least_steps: int = LEAST_STEPS) -> None:
        self._curves: dict[int, list[tuple[int, float]]] = {}
        for gamma in sorted({gamma for _, gamma in costs}):
            measured = sorted(
                (size, seconds / steps, float(steps))
                for (size, g), (steps, seconds) in costs.items()
                if g == gamma and steps >= least_steps
            )
            if measured:
                self._curves[gamma] = rising(measured)

    def gammas(self) -> list[int]:
        return list(self._curves)

    def seconds(self, size: int, gamma: int) -> float | None:
        """A straight line between the sizes measured; None outside of them and for a gamma that was not measured."""
        curve = self._curves.get(gamma, [])
        above = bisect.bisect_left(curve, (size,))
        if above < len(curve) and curve[above][0] == size:
            return curve[above][1]
        if above == 0 or above == len(curve):
            return None
        (x0, y0), (x1, y1) = curve[above - 1], curve[above]
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)

    def best(self, size: int, acceptance: Sequence[float], gammas: Sequence[int] | None = None) -> Choice | None:
        """The draft length with the least time per token; None if nothing is known about this size."""
        choices = []
        for gamma in self.gammas() if gammas is None else gammas:
            seconds = self.seconds(size, gamma)
            if seconds is not None:
                choices.append(Choice(gamma, seconds / expected_tokens(gamma, acceptance)))
        return min(choices, key=lambda choice: choice.seconds_per_token, default=None)


def makespan(lengths: Sequence[int], at_once: int, seconds_per_token: Callable[[int], float]) -> float:
    """Time until the last of these responses, `at_once` of them in flight, the next one sent when one ends.

    Everyone who runs gets tokens at the same pace, so a response ends when the pace has added up to its length.
    """
    waiting = iter(lengths)
    running: list[float] = []  # progress at which each ends
    progress = now = 0.0

    def admit() -> None:
        for length in waiting:
            heapq.heappush(running, progress + length)
            if len(running) >= at_once:
                return

    admit()
    while running:
        ending = running[0]
        now += (ending - progress) * seconds_per_token(len(running))
        progress = ending
        while running and running[0] <= progress:
            heapq.heappop(running)
        admit()
    return now


@dataclass(frozen=True)
class Saving:
    """Seconds, over all batches of lengths: measured under plain decode and the policy, computed from the costs for
    plain decode and the oracle. `gammas`: the oracle's draft length by batch size."""

    plain: float
    policy: float
    plain_computed: float
    oracle_computed: float
    gammas: dict[int, int]

    @property
    def achieved(self) -> float:
        return self.plain - self.policy

    @property
    def possible(self) -> float:
        return self.plain_computed - self.oracle_computed

    @property
    def share(self) -> float | None:
        """Of what the oracle saves; None where there is nothing to save."""
        return self.achieved / self.possible if self.possible > 0 else None


def saving(
    batches: Sequence[Sequence[int]],
    at_once: int,
    costs: Costs,
    acceptance: Sequence[float],
    plain: float,
    policy: float,
) -> Saving | None:
    """`plain`, `policy`: measured makespans, added up over `batches`. None if the costs of some size are unknown."""
    model = CostModel(costs)
    best: dict[int, Choice] = {}
    alone: dict[int, float] = {}
    for size in range(1, min(at_once, max(map(len, batches))) + 1):
        choice, plainly = model.best(size, acceptance), model.best(size, acceptance, [0])
        if choice is None or plainly is None:
            return None
        best[size], alone[size] = choice, plainly.seconds_per_token
    return Saving(
        plain,
        policy,
        sum(makespan(lengths, at_once, alone.__getitem__) for lengths in batches),
        sum(makespan(lengths, at_once, lambda size: best[size].seconds_per_token) for lengths in batches),
        {size: choice.gamma for size, choice in best.items()},
    )
