"""Acceptance, measured: alpha_i by draft position for the whole engine, and a posterior for every request.

Position i of a chain is verified only if all drafts before it were accepted, so what is counted is the conditional
acceptance alpha_i. Counts fade: `memory` is the number of request-steps after which a count has lost a factor e,
whatever position it belongs to. A position that is no longer drafted therefore returns to the estimate of the one
before it:

    alpha_i = (accepted_i + SHRINK * alpha_{i-1}) / (drafted_i + SHRINK),   alpha_{-1} = the prior.

A request may be easier or harder than the others. With h_i = -ln alpha_i, its chain survives i drafts with probability
exp(-theta * (h_0 + ... + h_{i-1})); theta is 1 for the average request. Rejections are then counts of a Poisson process
with exposure h, and a Gamma(STRENGTH, STRENGTH) prior has the posterior mean
theta = (STRENGTH + rejections) / (STRENGTH + exposure): the Gamma-Poisson pair of any textbook (Gelman et al., Bayesian
Data Analysis, section 2.6).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

PRIOR_ALPHA = 0.9
PRIOR_WEIGHT = 8.0
SHRINK = 12.0
STRENGTH = 4.0
MEMORY = 600.0
# With more requests than this the average says as much as the posteriors, for less time.
TRACKED_ROWS = 16
# What is left of the evidence when the policy's weights change: alpha moves little from one update to the next.
KEPT_EVIDENCE = 40.0
_LEAST_ALPHA, _MOST_ALPHA = 0.01, 0.9995


class AcceptanceTracker:
    """`observe` after every drafting step; `tokens` before the next one."""

    def __init__(self, gamma_max: int, memory: float = MEMORY) -> None:
        self._memory = memory
        self._drafted = [0.0] * gamma_max
        self._accepted = [0.0] * gamma_max
        # Exact totals since the start, for reports.
        self.drafted_at = [0] * gamma_max
        self.accepted_at = [0] * gamma_max
        self.ignored = 0
        self._alphas: list[float] = []
        self._hazards: list[float] = []  # h_0, h_0 + h_1, ...
        self._survival: list[float] = []  # expected tokens of the average request, by gamma: 1, 1 + alpha_0, ...
        self._requests: dict[Hashable, list[float]] = {}  # rejections, exposure
        self._estimate()

    def observe(self, gamma: int, accept_lens: Sequence[int], requests: Sequence[Hashable] = ()) -> None:
        """`accept_lens`: tokens committed per request that drafted, bonus included; `requests`: who they are."""
        if not accept_lens or not 0 < gamma <= len(self._drafted):
            return
        if min(accept_lens) < 1 or max(accept_lens) > gamma + 1:
            self.ignored += 1
            return
        at_least = [0] * (gamma + 2)  # [n]: requests that committed n tokens or more
        for count in accept_lens:
            at_least[count] += 1
        for count in range(gamma, 0, -1):
            at_least[count] += at_least[count + 1]
        self._fade(math.exp(-len(accept_lens) / self._memory))
        for position in range(gamma):
            drafted, accepted = at_least[position + 1], at_least[position + 2]
            self._drafted[position] += drafted
            self._accepted[position] += accepted
            self.drafted_at[position] += drafted
            self.accepted_at[position] += accepted
        self._estimate()
        if len(requests) == len(accept_lens) <= TRACKED_ROWS:
            self._observe_requests(gamma, accept_lens, requests)

    def _observe_requests(self, gamma: int, accept_lens: Sequence[int], requests: Sequence[Hashable]) -> None:
        posteriors: dict[Hashable, list[float]] = {}
        for request, count in zip(requests, accept_lens):
            rejections, exposure = self._requests.get(request, (0.0, 0.0))
            fade = 1.0 - 1.0 / self._memory
            verified = min(count, gamma)
            posteriors[request] = [
                rejections * fade + (count <= gamma),
                exposure * fade + self._hazards[verified - 1],
            ]
        # Whoever is not in the batch any more is forgotten: memory does not grow.
        self._requests = posteriors

    def idle(self, rows: int, steps: float = 1.0) -> None:
        """Steps that drafted nothing: evidence ages, so that an old verdict does not stand for ever."""
        self._fade(math.exp(-rows * steps / (8.0 * self._memory)))
        self._estimate()

    def weights_changed(self) -> None:
        """The next steps count for much; what was measured remains as an idea."""
        most = max(self._drafted, default=0.0)
        if most > KEPT_EVIDENCE:
            self._fade(KEPT_EVIDENCE / most)
        self._requests = {}
        self._estimate()

    def _fade(self, factor: float) -> None:
        self._drafted = [count * factor for count in self._drafted]
        self._accepted = [count * factor for count in self._accepted]

    def _estimate(self) -> None:
        alpha, weight = PRIOR_ALPHA, PRIOR_WEIGHT
        self._alphas, self._hazards, self._survival = [], [], [1.0]
        hazard, survival, tokens = 0.0, 1.0, 1.0
        for drafted, accepted in zip(self._drafted, self._accepted):
            alpha = (accepted + weight * alpha) / (drafted + weight)
            alpha = min(max(alpha, _LEAST_ALPHA), _MOST_ALPHA)
            weight = SHRINK
            hazard -= math.log(alpha)
            survival *= alpha
            tokens += survival
            self._alphas.append(alpha)
            self._hazards.append(hazard)
            self._survival.append(tokens)

    def alphas(self) -> list[float]:
        """alpha_i of the average request."""
        return list(self._alphas)

    def hoped(self, gamma: int, deviations: float) -> list[float]:
        """Expected tokens of one request by draft length, with every alpha_i that much better than estimated."""
        survival, tokens, result = 1.0, 1.0, [1.0]
        for alpha, drafted in zip(self._alphas[:gamma], self._drafted):
            spread = math.sqrt(alpha * (1.0 - alpha) / (drafted + PRIOR_WEIGHT))
            survival *= min(alpha + deviations * spread, _MOST_ALPHA)
            tokens += survival
            result.append(tokens)
        return result

    def theta(self, request: Hashable) -> float:
        """How much faster than the average this request loses its chain."""
        rejections, exposure = self._requests.get(request, (0.0, 0.0))
        return (STRENGTH + rejections) / (STRENGTH + exposure)

    def tokens(self, gamma: int, rows: int, requests: Sequence[Hashable] = ()) -> list[float]:
        """Expected tokens of a step over `rows` requests, for the draft lengths 0..gamma."""
        if not 0 < len(requests) <= TRACKED_ROWS:
            return [rows * tokens for tokens in self._survival[: gamma + 1]]
        total = [float(len(requests))] * (gamma + 1)
        for theta in map(self.theta, requests):
            tokens = 0.0
            for length in range(1, gamma + 1):
                tokens += math.exp(-theta * self._hazards[length - 1])
                total[length] += tokens
        return total

    def describe(self) -> dict[str, object]:
        return {
            "alpha": [round(alpha, 4) for alpha in self._alphas],
            "evidence": [round(count, 1) for count in self._drafted],
            "drafted_at": list(self.drafted_at),
            "accepted_at": list(self.accepted_at),
            "ignored": self.ignored,
        }
