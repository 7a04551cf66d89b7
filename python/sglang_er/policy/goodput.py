"""The default policy: the draft length with the most expected tokens per second, from measured cost and acceptance.

    gamma* = argmax over 0..limit of  sum over requests of E[tokens | gamma]  /  T_step(gamma)

Costs come from `cost_model`, expectations from `acceptance`. What was never tried is known badly, so a small share of
the time (probes.SHARE) goes into steps with another draft length, plain decode among them, but only where that could be
the better one: its rate at two standard deviations in its favour is above the best one's. Evidence ages, so that a
verdict is looked at again whatever it was: no state is final.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from sglang_er.policy import probes
from sglang_er.policy.acceptance import TRACKED_ROWS, AcceptanceTracker
from sglang_er.policy.base import StepOutcome, StepState
from sglang_er.policy.cost_features import Step
from sglang_er.policy.cost_model import CostModel
from sglang_er.policy.early_stop import EarlyStop, Plan
from sglang_er.policy.guard import Guard
from sglang_er.policy.probes import PlainChecks, Probe, ProbeBudget, Tried

Objective = Literal["tokens", "makespan"]
_PROBE_EVERY = 4
_DEVIATIONS = 2.0
# Of a step's seconds: what the cost of a draft length may be off by, once it was not tried for long.
_UNTRIED = 0.15
# Makespan: the requests that lose their chain most often are the last to end.
_STRAGGLERS = 0.25


class GoodputPolicy:
    """`objective`: all tokens count the same, or those of the stragglers; `hysteresis`: relative gain below which the
    draft length stays, for engines where a change costs something."""

    def __init__(
        self,
        gamma_max: int,
        objective: Objective = "tokens",
        cost: CostModel | None = None,
        hysteresis: float = 0.0,
        probe_share: float = probes.SHARE,
    ) -> None:
        self.cost = CostModel() if cost is None else cost
        self.tracker = AcceptanceTracker(gamma_max)
        self.guard = Guard()
        self.early_stop = EarlyStop()
        self.stops_early = False  # whether somebody asks `goes_on`
        self.objective: Objective = objective
        self._gamma_max = gamma_max
        self._hysteresis = hysteresis
        self.budget, self.checks, self.tried = ProbeBudget(probe_share), PlainChecks(), Tried(gamma_max)
        self._last = 0
        # How many tokens the step that was chosen last may draft, as long as `goes_on`.
        self.reach = 0
        self._steps = self._switches = 0
        self._predicted = self._measured = 0.0

    # -- before a step -------------------------------------------------------------------------------------------

    def choose(self, state: StepState) -> int:
        limit = min(state.gamma_limit, self._gamma_max)
        self.reach = 0
        self.early_stop.begin(None)
        if state.speculative_rows == 0 or limit <= 0 or not self.cost.ready:
            return 0
        if self._steps == 0:
            self.budget.begin(self.cost.scale)
        self._steps += 1
        step = Step(state.batch_size, state.context_tokens)
        tokens = self._tokens(state, limit)
        seconds = self.cost.curve(step, limit, state.speculative_rows)
        rates = [expected / cost for expected, cost in zip(tokens, seconds)]
        best = rates.index(max(rates)) if self.guard.allows() else 0
        if self._last <= limit and self.guard.allows() and rates[best] <= rates[self._last] * (1.0 + self._hysteresis):
            best = self._last
        probe = None
        if best and self.checks.due(state.batch_size, rates[best] / rates[0]):
            probe = 0
            self.checks.spend(state.batch_size)
        elif self.budget.seconds > 0.0 and self._steps % _PROBE_EVERY == 0:
            probe = self._worth_probing(state, step, limit, seconds, rates, best)
        if probe is not None:
            worth = seconds[probe] * rates[probe] / rates[best]
            self.budget.pay(Probe(state.batch_size, probe, max(0.0, seconds[probe] - worth), worth))
            self.reach = probe
            return probe
        self._switches += best != self._last
        self._last = self.reach = best
        if best and self.stops_early and state.speculative_rows <= TRACKED_ROWS and self.objective == "tokens":
            self.reach = limit
            self.early_stop.begin(Plan(state.batch_size, seconds, self.tracker.alphas(), rates[best]))
        return best

    def goes_on(self, confidences: Sequence[float]) -> bool:
        """Whether to draft on after a token with these confidences, one per drafting row."""
        return self.early_stop.goes_on(confidences)

    def _tokens(self, state: StepState, limit: int) -> list[float]:
        """Expected tokens of the whole step by draft length, or under objective makespan those of the stragglers."""
        rows, requests = state.speculative_rows, state.requests
        if self.objective == "makespan" and len(requests) > 1:
            slowest = sorted(requests, key=self.tracker.theta, reverse=True)
            requests = slowest[: max(1, math.ceil(len(requests) * _STRAGGLERS))]
            return self.tracker.tokens(limit, len(requests), requests)
        tokens = self.tracker.tokens(limit, rows, requests)
        others = state.batch_size - rows
        return [count + others for count in tokens] if others else tokens

    def _worth_probing(
        self, state: StepState, step: Step, limit: int, seconds: list[float], rates: list[float], best: int
    ) -> int | None:
        """Another draft length that may be better than the best known one and that the budget can pay."""
        promise, chosen = rates[best], None
        hoped = self.tracker.hoped(limit, _DEVIATIONS)
        expected = self.tracker.tokens(limit, 1)
        for gamma in range(limit + 1):
            cost = seconds[gamma] * max(0.0, 1.0 - rates[gamma] / rates[best])
            if gamma == best or cost > self.budget.seconds:
                continue
            deviation = self.cost.deviation(step, gamma, best, state.speculative_rows, seconds)
            if self.tried.long_ago(state.batch_size, gamma):
                deviation = max(deviation, _UNTRIED * seconds[gamma])
            least = max(seconds[gamma] - _DEVIATIONS * deviation, 0.2 * seconds[gamma])
            rate = rates[gamma] * seconds[gamma] * hoped[gamma] / expected[gamma] / least
            if rate > promise:
                promise, chosen = rate, gamma
        return chosen

    # -- after it ------------------------------------------------------------------------------------------------

    def observe(self, outcome: StepOutcome) -> None:
        state, gamma = outcome.state, outcome.gamma
        step = Step(state.batch_size, state.context_tokens)
        self.budget.settle(state.batch_size, gamma, outcome.seconds)
        self.tried.step(state.batch_size, gamma)
        if gamma == 0:
            self.checks.plain(state.batch_size)
            self.cost.observe_plain(step, outcome.seconds)
            self.tracker.idle(state.speculative_rows)
            self.guard.passed()
        else:
            self.checks.drafted(state.batch_size)
            drafting = step._replace(rows=state.speculative_rows)
            predicted = self.cost.step(step, gamma, state.speculative_rows) if self.cost.ready else math.nan
            self.cost.observe_speculative(drafting, step, gamma, outcome.seconds, outcome.draft_seconds)
            self.tracker.observe(gamma, outcome.accept_lens, state.requests)
            if outcome.confidences:
                self.early_stop.observe(outcome.confidences, outcome.accept_lens)
            if self.cost.ready and 0.0 < outcome.seconds < math.inf:
                tokens = sum(outcome.accept_lens) + state.batch_size - len(outcome.accept_lens)
                self.guard.drafted(outcome.seconds, self.cost.plain(step) * tokens / state.batch_size)
                self._predicted += predicted if math.isfinite(predicted) else outcome.seconds
                self._measured += outcome.seconds
        if self.cost.ready:
            self.budget.earn(outcome.seconds, self.cost.scale)

    def weights_changed(self) -> None:
        self.tracker.weights_changed()
        self.early_stop.weights_changed()

    def describe(self) -> dict[str, Any]:
        return {
            "policy": "goodput",
            "objective": self.objective,
            "gamma": self._last,
            "switches": self._switches,
            "probes": self.budget.probes,
            "predicted_seconds": round(self._predicted, 4),
            "measured_seconds": round(self._measured, 4),
            "acceptance": self.tracker.describe(),
            "cost": self.cost.describe(),
            "guard": self.guard.describe(),
            "early_stop": self.early_stop.describe() if self.stops_early else None,
        }
