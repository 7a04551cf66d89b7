"""Seconds of a step: plain decode, a draft pass, a verify pass; learnt from the steps themselves.

A forward pass over n rows (tokens of all requests together) with a context of C tokens in all and S on average costs

    T(n, C, S) = f(n) + a C + b S

f is the roofline with its steps: flat while the weights' bytes bound it, then rising with the arithmetic. It is
piecewise linear between KNOTS, and each of its values is a weight of a linear model, as are a (KV bytes: every request
reads its own context) and b (what grows with the longest context only). There are two such models: the draft pass of
one token (n = B), and the target's pass, which plain decode (n = B) and verification (n = B (gamma + 1)) share; a
verify pass costs e(n) + c C + d S more, with few knots for e.

    T_step(0) = T_plain(B),   T_step(gamma) = gamma T_draft(B) + T_verify(B (gamma + 1))

The prior knows the shape and next to nothing about the level: f is a local linear trend over the knots, so that a
measurement at 8 rows moves the values at 4 and 16 too, and a slope goes on behind the last one. Unit of
the models is `scale`, what the first plain step says about a step of one row. As long as nothing was drafted, draft
passes are as much dearer than the prior as plain steps turned out.

Steps that were disturbed are clipped at OUTLIER standard deviations; several in a row on the same side mean that the
machine has changed, and reopen the model. Times that are no times (nan, 0, negative) are counted and ignored.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sglang_er.policy.cost_features import (
    EXTRA_KNOTS,
    KNOTS,
    Step,
    draft_prior,
    features_of,
    target_prior,
    verify_at,
    verify_features,
)
from sglang_er.policy.linear_model import Features, LinearModel

NOISE = 0.03  # relative standard deviation of a step's seconds, before anything is known about it
_LEAST_NOISE = 0.01
OUTLIER = 3.0
_OUTLIERS_IN_A_ROW = 6
_RELAX_EVERY = 32
_RELAX = 0.01
_AGE = 0.01
# A plain step costs at most so much of the verify passes with these draft lengths; more than 1, because both are noisy.
_BOUND, _BOUNDS = 1.05, (1, 3, 7)
_REOPEN = 0.3
# After timing forwards: deviation of a factor on all of them, and share of the prior that is believed again.
_DOUBT = (0.2, 0.05)
_LEAST = 0.01  # of a plain step: a line through few points may cross zero


KINDS = ("plain", "draft", "verify")


class CostModel:
    """Learns from `observe_*`, answers with `plain`, `draft`, `verify`. Nothing is known before the first plain step:
    `ready` says so."""

    def __init__(self) -> None:
        self.scale = math.nan
        self.ignored = 0
        self.observed: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._target, self._draft = target_prior(), draft_prior()
        self._models = {"plain": self._target, "draft": self._draft, "verify": self._target}
        self._told_apart = False  # whether verify passes were ever timed without the draft pass
        self._noise = dict.fromkeys(KINDS, NOISE)
        self._outliers = dict.fromkeys(KINDS, 0)
        self._seeding = False

    @property
    def ready(self) -> bool:
        return not math.isnan(self.scale)

    # -- learning ------------------------------------------------------------------------------------------------

    def observe_plain(self, step: Step, seconds: float) -> None:
        if self._usable(seconds):
            if not self.ready:
                self.scale = seconds / self._target.predict(features_of(step.rows, step))
            self._learn("plain", features_of(step.rows, step), seconds / self.scale)
            if self.observed["draft"] and self.observed["plain"] % _RELAX_EVERY == 0:
                # While nothing is drafted, what was found of the draft pass ages: dear once is not dear for ever.
                self._draft.age(_AGE, self._dearer(step))

    def observe_draft(self, step: Step, seconds: float) -> None:
        """One token's draft pass."""
        if self._usable(seconds) and self.ready:
            self._anchor_draft(step)
            self._learn("draft", features_of(step.rows, step), seconds / self.scale)

    def observe_verify(self, step: Step, gamma: int, seconds: float) -> None:
        if self._usable(seconds) and self.ready:
            self._told_apart = True
            self._learn("verify", verify_features(step, gamma), seconds / self.scale)

    def observe_speculative(self, draft: Step, verify: Step, gamma: int, seconds: float, draft_seconds: float) -> None:
        """A whole step. Where the draft pass's part is not known (nan), the surprise goes to whom it is likelier to
        belong to: the two models are one linear model whose observation is the sum."""
        if not self._usable(seconds) or not self.ready:
            return
        if not math.isnan(draft_seconds):
            if not 0.0 < draft_seconds < seconds:
                self.ignored += 1
                return
            self.observe_draft(draft, draft_seconds / gamma)
            self.observe_verify(verify, gamma, seconds - draft_seconds)
            return
        self._anchor_draft(draft)
        drafting, verifying = self._draft, self._target
        of_draft = [(index, value * gamma) for index, value in features_of(draft.rows, draft)]
        of_verify = verify_features(verify, gamma)
        predicted = drafting.predict(of_draft) + verifying.predict(of_verify)
        noise = (self._noise["verify"] * predicted) ** 2
        spreads = drafting.variance(of_draft), verifying.variance(of_verify)
        spread = math.sqrt(sum(spreads) + noise)
        error = self._clipped("verify", seconds / self.scale - predicted, spread, drafting)
        drafting.update(of_draft, error, noise + spreads[1])
        verifying.update(of_verify, error, noise + spreads[0])
        self._count("draft")
        self._count("verify")

    def _usable(self, seconds: float) -> bool:
        usable = math.isfinite(seconds) and seconds > 0.0
        self.ignored += not usable
        return usable

    def _dearer(self, step: Step) -> float:
        """Plain steps of this size, against what the prior expected of them."""
        features = features_of(step.rows, step)
        return max(self._target.predict(features), _LEAST) / self._target.expected(features)

    def _anchor_draft(self, step: Step) -> None:
        """Before the first observation: the prior at the level of what is known."""
        if self.observed["draft"] == 0:
            level = self._dearer(step)
            self._draft.mean = [level * value for value in self._draft.mean]

    def _learn(self, kind: str, features: Features, value: float) -> None:
        model = self._models[kind]
        predicted = model.predict(features)
        if self._seeding:  # nothing else runs: whatever the prior expected, this is what it takes
            model.update(features, value - predicted, (NOISE * value) ** 2)
        else:
            noise = (self._noise[kind] * max(predicted, 1e-3)) ** 2
            error = self._clipped(kind, value - predicted, math.sqrt(model.variance(features) + noise))
            model.update(features, error, noise)
        self._count(kind)

    def _clipped(self, kind: str, error: float, deviation: float, beside: LinearModel | None = None) -> float:
        """The error, or as much of it as a disturbance may have; `beside`: another model that may be to blame."""
        limit = OUTLIER * deviation
        seen = min(abs(error) / deviation, OUTLIER)
        # Noise follows what is seen: E |z| = sqrt(2 / pi) for a normal z.
        self._noise[kind] = max(_LEAST_NOISE, self._noise[kind] * math.exp(0.02 * (seen - 0.8)))
        self._noise[kind] = min(self._noise[kind], 0.3)
        if abs(error) <= limit:
            self._outliers[kind] = 0
            return error
        side = 1 if error > 0 else -1
        before = self._outliers[kind]
        self._outliers[kind] = before + side if before * side > 0 else side
        if abs(self._outliers[kind]) >= _OUTLIERS_IN_A_ROW:
            self._models[kind].relax(_REOPEN)
            if beside is not None:
                beside.relax(_REOPEN)
            self._outliers[kind] = 0
        return math.copysign(limit, error)

    @contextmanager
    def seeding(self) -> Iterator[None]:
        """While forwards are timed by themselves. Then a step has more to do than its forwards: the first real ones
        count for much."""
        self._seeding = True
        try:
            yield
        finally:
            self._seeding = False
            self._target.doubt(*_DOUBT)
            self._draft.doubt(*_DOUBT)

    def _count(self, kind: str) -> None:
        self.observed[kind] += 1
        if self.observed[kind] % _RELAX_EVERY == 0:
            self._models[kind].relax(_RELAX)

    # -- answers -------------------------------------------------------------------------------------------------

    def plain(self, step: Step) -> float:
        return self._bounded(step)[0]

    def draft(self, step: Step) -> float:
        return max(self._draft_seconds(step), self.scale * _LEAST)

    def _draft_seconds(self, step: Step) -> float:
        seconds = self.scale * self._draft.predict(features_of(step.rows, step))
        return seconds if self.observed["draft"] else seconds * self._dearer(step)

    def verify(self, step: Step, gamma: int) -> float:
        return max(self.scale * self._target.predict(verify_features(step, gamma)), self._bounded(step)[1])

    def _bounded(self, step: Step) -> tuple[float, float]:
        """Seconds of a plain step, and the least of a verify pass, which has its rows and more.

        Where every step drafts, plain ones are not measured and may be remembered from a slower time; where none does,
        a trend may have taken verify passes below them. If the two disagree, the better known one is believed.
        """
        features = features_of(step.rows, step)
        plain = max(self._target.predict(features), _LEAST)
        verifies = verify_at(self._target.mean, step, _BOUNDS)
        low = max(min(verifies), _LEAST)
        if plain > _BOUND * low and self._told_apart:
            cheapest = verify_features(step, _BOUNDS[verifies.index(min(verifies))])
            if self._target.variance(cheapest) < self._target.variance(features):
                plain = _BOUND * low
        return self.scale * plain, self.scale * plain / _BOUND

    def step(self, step: Step, gamma: int, drafting: int | None = None) -> float:
        """Seconds of a step; `drafting`: rows that draft, all without it."""
        return self.curve(step, gamma, step.rows if drafting is None else drafting)[gamma]

    def curve(self, step: Step, limit: int, drafting: int) -> list[float]:
        """Seconds of a step for the draft lengths 0..limit."""
        plain, least = self._bounded(step)
        draft, seconds = self._draft_seconds(step._replace(rows=drafting)), [plain]
        if self._told_apart:
            draft = max(draft, self.scale * _LEAST)
        for gamma, verify in enumerate(verify_at(self._target.mean, step, range(1, limit + 1)), 1):
            if self._told_apart:
                seconds.append(gamma * draft + max(self.scale * verify, least))
            else:  # their sum is known, and more rows or another draft may be what a longer one costs
                seconds.append(max(gamma * draft + self.scale * verify, least))
        return seconds

    def deviation(
        self, step: Step, gamma: int, other: int, drafting: int, seconds: Sequence[float] | None = None
    ) -> float:
        """How far the seconds of a step with `gamma` drafts may be from what they are believed to be, given those with
        `other`: what both are wrong about alike, as a pace of the whole machine, tells them not apart. `seconds`: the
        step's curve, where the caller has it."""
        seconds = seconds or self.curve(step, max(gamma, other), drafting)
        ratio = seconds[gamma] / seconds[other]
        target, passes = defaultdict[int, float](float), gamma - ratio * other
        for drafts, share in ((gamma, 1.0), (other, -ratio)):
            for index, value in verify_features(step, drafts) if drafts else features_of(step.rows, step):
                target[index] += share * value
        variance = self._target.variance(list(target.items()))
        if passes:
            variance += passes**2 * self._draft.variance(features_of(drafting, step))
        return self.scale * math.sqrt(variance)

    # -- keeping -------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "knots": [*KNOTS, *EXTRA_KNOTS],
            "scale": self.scale,
            "observed": dict(self.observed),
            "noise": dict(self._noise),
            "weights": {"target": list(self._target.mean), "draft": list(self._draft.mean)},
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> CostModel:
        """Means only: the machine of today has to confirm them. Raises ValueError for what is no saved model."""
        model = CostModel()
        try:
            if tuple(content["knots"]) != KNOTS + EXTRA_KNOTS:
                raise ValueError("its knots are others")
            model.scale = float(content["scale"])
            model.observed = {kind: int(content["observed"][kind]) for kind in KINDS}
            for name, learnt in (("target", model._target), ("draft", model._draft)):
                weights = [float(value) for value in content["weights"][name]]
                if len(weights) != len(learnt.mean) or not all(map(math.isfinite, weights)):
                    raise ValueError(f"weights of {name} are damaged")
                learnt.mean = weights
        except (KeyError, TypeError) as error:
            raise ValueError(f"{error} is missing or damaged") from None
        if not (math.isfinite(model.scale) and model.scale > 0):
            raise ValueError("its scale is no time")
        return model

    def describe(self) -> dict[str, object]:
        return {
            "plain_step_seconds": self.scale if self.ready else None,
            "observed": dict(self.observed),
            "noise": {kind: round(noise, 4) for kind, noise in self._noise.items()},
            "ignored": self.ignored,
        }
