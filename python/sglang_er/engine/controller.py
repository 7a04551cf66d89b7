"""Who decides the draft length in this engine, and what is learnt from its steps whoever decides."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_er.config import RolloutConfig
from sglang_er.engine.ranks import ALONE, Ranks
from sglang_er.policy import GoodputPolicy, Policy, StepOutcome, StepState, cost_file, make_policy, seeding
from sglang_er.policy.cost_features import Step
from sglang_er.policy.health import OFF_UNTIL, DraftHealth

logger = logging.getLogger(__name__)


class Controller:
    """The policy of the configuration, and beside it the one that learns from every step: it accounts for what
    speculation saves, and is ready when it is chosen."""

    def __init__(
        self,
        config: RolloutConfig,
        measured_on: Mapping[str, str],
        ranks: Ranks = ALONE,
        on_host: bool = True,
    ) -> None:
        """`measured_on`: what costs belong to; `ranks`: those that run every pass together;
        `on_host`: what the twin says can be looked at without waiting for a device.

        Raises StaleCosts or OSError for a file of costs that is no use.
        """
        self._ranks = ranks
        self._may_stop_early = on_host and ranks.alone
        self.measured_on = dict(measured_on)
        cost = cost_file.load(Path(config.cost_file), measured_on) if config.cost_file else None
        self.learnt = GoodputPolicy(config.gamma_max, cost=cost)
        self.health = DraftHealth(config.gamma_max)
        self.configure(config)

    def configure(self, config: RolloutConfig) -> None:
        """Another policy; what was learnt stays."""
        self.policy: Policy = make_policy(config, self.learnt)
        self.stops_early = self._may_stop_early and config.early_stop and self.policy is self.learnt
        self.learnt.stops_early = self.stops_early
        self.health.configure(config.health_drop)

    def seed(self, timings: Sequence[seeding.Timing], spent: float) -> None:
        """Forwards that were timed at start-up."""
        seeding.seed(self.learnt.cost, timings)
        if self.learnt.cost.ready:
            plain = 1e3 * self.learnt.cost.plain(Step(1, 64))
            logger.info("sglang-er: %d forwards timed in %.1f s; a plain step: %.1f ms", len(timings), spent, plain)

    def choose(self, state: StepState, ready: bool = True) -> int:
        """Draft length of this step, in 0..state.gamma_limit, the same on every rank; 0 unless all are `ready`."""
        if not self._ranks.first:
            return self._ranks.agreed(int(ready))
        gamma = self.policy.choose(state) if ready and self.health.allows() else 0
        return self._ranks.agreed(max(0, min(state.gamma_limit, gamma)))

    def reach(self, gamma: int) -> int:
        """How far a draft may go that was chosen with this length, as long as `goes_on`."""
        return max(gamma, self.learnt.reach) if self.stops_early else gamma

    def goes_on(self, confidences: Sequence[float]) -> bool:
        """Whether to draft on after a token with these confidences, one per drafting row; only if `stops_early`."""
        return self.learnt.goes_on(confidences)

    def observe(self, outcome: StepOutcome) -> None:
        self.learnt.observe(outcome)
        if self.policy is not self.learnt:
            self.policy.observe(outcome)
        if alarm := self.health.observe(outcome.gamma, outcome.accept_lens):
            logger.warning("sglang-er: speculation is off %s: %s", OFF_UNTIL, alarm)

    def weights_changed(self) -> None:
        self.learnt.weights_changed()
        if self.policy is not self.learnt:
            self.policy.weights_changed()
        self.health.weights_changed()

    def describe(self) -> dict[str, Any]:
        """For /server_info and /er/state."""
        costs = {"measured_on": self.measured_on, "model": self.learnt.cost.to_json()}
        return {
            "policy": self.policy.describe(),
            "controller": {**self.learnt.describe(), "costs": costs},
            "health": self.health.describe(),
        }
