"""What a step costs, whoever says it: a measured sweep (`sweep.py`) or a formula (`roofline.py`).

A step with draft length g over a batch B with mean context S takes T_ar(B, S) for g = 0 and
T_cycle = g * T_draft(B, S) + T_verify(B, S, g) otherwise. All in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

# Contexts are rounded to this many tokens before costs are looked up: below .2 % of a step, and most steps of a
# rollout then ask for what is known already.
CONTEXT_STEP = 32


class StepCosts(Protocol):
    """Seconds of the three passes of a model on a machine."""

    name: str
    gamma_max: int  # longest draft that is known
    batch_max: int  # largest batch that is known

    def plain(self, batch: int, context: float) -> float:
        """One step of plain decode."""
        ...

    def draft(self, batch: int, context: float) -> float:
        """One drafted token for every request of the batch."""
        ...

    def verify(self, batch: int, context: float, gamma: int) -> float:
        """One forward of the target over gamma + 1 tokens per request, gamma at least 1."""
        ...


class PrivateKv:
    """Costs that were measured on requests with one common prompt, whose KV is read once per pass, made into those of
    requests with contexts of their own: `seconds_per_token` for every token of every request but the first."""

    def __init__(self, costs: StepCosts, seconds_per_token: float) -> None:
        self.name = f"{costs.name} + {1e9 * seconds_per_token:g} ns per token of private KV"
        self.gamma_max, self.batch_max = costs.gamma_max, costs.batch_max
        self._costs, self._seconds = costs, seconds_per_token

    def plain(self, batch: int, context: float) -> float:
        return self._costs.plain(batch, context) + self._reading(batch, context)

    def draft(self, batch: int, context: float) -> float:
        return self._costs.draft(batch, context) + self._reading(batch, context)

    def verify(self, batch: int, context: float, gamma: int) -> float:
        return self._costs.verify(batch, context, gamma) + self._reading(batch, context)

    def _reading(self, batch: int, context: float) -> float:
        return self._seconds * (batch - 1) * context


class Constant(NamedTuple):
    """One that costs were computed with. `source`: measured, when and with which commit, or estimated."""

    name: str
    value: str
    source: str


class Cycle(NamedTuple):
    """Every draft length at one batch size and context. `seconds[g]`: the whole step with g drafts."""

    draft: float
    seconds: list[float]
    array: npt.NDArray[np.float64]  # the same, to compute with


class StepTable:
    """Costs as the simulator asks for them: all draft lengths at once, each question answered once. `constants`: what
    the costs rest on, where a reader should be told."""

    def __init__(self, costs: StepCosts, gamma_max: int, constants: Sequence[Constant] = ()) -> None:
        if not 0 <= gamma_max <= costs.gamma_max:
            raise ValueError(f"--gamma-max {gamma_max}: {costs.name} knows draft lengths from 0 to {costs.gamma_max}")
        self.costs, self.gamma_max, self.constants = costs, gamma_max, list(constants)
        self._known: dict[tuple[int, int], Cycle] = {}

    def at(self, batch: int, context: float) -> Cycle:
        key = batch, int(context / CONTEXT_STEP + 0.5)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._cycle(batch, key[1] * CONTEXT_STEP)
        return found

    def _cycle(self, batch: int, context: int) -> Cycle:
        draft = self.costs.draft(batch, context)
        seconds = [self.costs.plain(batch, context)]
        seconds += [g * draft + self.costs.verify(batch, context, g) for g in range(1, self.gamma_max + 1)]
        return Cycle(draft, seconds, np.asarray(seconds))
