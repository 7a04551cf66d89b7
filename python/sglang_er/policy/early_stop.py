"""When to end a draft: what the twin said about the tokens so far against what more of them would cost.

The confidence c of a drafted token is the largest probability of the distribution that it was drawn from. It foretells
acceptance far better than the position does: where c is near 1 nearly every draft is kept, elsewhere three in four. The
acceptance of each band of c is measured, with counts that fade, and shrunk to the engine's average.

After d drafts, s_r = product of acceptance(c) over them is the probability that request r still follows its chain. The
draft goes on while some k > d has

    sum over r of s_r (alpha_{d+1} + ... + alpha_{d+1} ... alpha_k)  >  rate (T(k) - T(d)),

that is, while more drafts bring more tokens than the same seconds bring on average (the marginal value theorem; Charnov
1976). `rate` is the plan's expected tokens per second times what such plans really gave: stopping early gives more than
the best fixed length, and the rule is optimal for the rate that it reaches itself (Dinkelbach 1967).

Exact: a stop depends on tokens that are verified and on their q, never on a token that is not.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from sglang_er.policy.acceptance import PRIOR_ALPHA

# Upper ends of the bands of c but the last: equal steps of log(1 - c) for the most part.
BANDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
MEMORY = 4000.0  # drafted tokens after which a count has lost a factor e
SHRINK = 12.0
_PACE_MEMORY, _PACE_WEIGHT = 200.0, 20.0  # steps, tokens
_LEAST_PACE, _MOST_PACE = 0.8, 1.3


class Plan(NamedTuple):
    """What a step was planned with."""

    batch_size: int
    seconds: Sequence[float]  # of the step, for the draft lengths 0..limit
    alphas: Sequence[float]  # [i]: acceptance of draft i, given that all before it were accepted
    rate: float  # most expected tokens per second of a fixed length


class EarlyStop:
    """`begin` with a step's plan, `goes_on` after every drafted token, `observe` after the step."""

    def __init__(self) -> None:
        self._drafted = [0.0] * (len(BANDS) + 1)
        self._accepted = [0.0] * (len(BANDS) + 1)
        self._plan: Plan | None = None
        self._survival: list[float] = []  # of each drafting row's chain
        self._length, self._tokens = 0, 0.0  # drafted so far; expected of the step as it stands
        self._average = PRIOR_ALPHA
        self._real = self._planned = 0.0  # tokens: expected where drafts ended, and at the plans' rates
        self.stopped = 0  # drafts that ended before their limit
        self.ignored = 0

    def begin(self, plan: Plan | None) -> None:
        """A new step. None: its draft length is fixed."""
        if self._plan is not None and self._length:
            fade = 1.0 - 1.0 / _PACE_MEMORY
            self._real = self._real * fade + self._tokens
            self._planned = self._planned * fade + self._plan.rate * self._plan.seconds[self._length]
        self._plan, self._survival, self._length = plan, [], 0
        self._tokens = 0.0 if plan is None else float(plan.batch_size)
        self._average = (sum(self._accepted) + SHRINK * PRIOR_ALPHA) / (sum(self._drafted) + SHRINK)

    def acceptance(self, confidence: float) -> float:
        """Of a draft of this confidence."""
        return self._acceptance_of(bisect_right(BANDS, confidence))

    def _acceptance_of(self, band: int) -> float:
        return (self._accepted[band] + SHRINK * self._average) / (self._drafted[band] + SHRINK)

    def pace(self) -> float:
        """Tokens per second of the drafts as they ended, over the plans' rates."""
        pace = (self._real + _PACE_WEIGHT) / (self._planned + _PACE_WEIGHT)
        return min(max(pace, _LEAST_PACE), _MOST_PACE)

    def goes_on(self, confidences: Sequence[float]) -> bool:
        """Whether to draft another token after one with these confidences, one per drafting row. Asked after the last
        one that the step can hold, too."""
        plan = self._plan
        if plan is None:
            return True
        survival = self._survival or [1.0] * len(confidences)
        self._survival = [share * self.acceptance(value) for share, value in zip(survival, confidences)]
        self._length += 1
        following, rate = sum(self._survival), plan.rate * self.pace()
        self._tokens += following
        gain, paid = 0.0, plan.seconds[self._length]
        for length in range(self._length + 1, len(plan.seconds)):
            following *= plan.alphas[length - 1]
            gain += following
            if gain > rate * (plan.seconds[length] - paid):
                return True
        self.stopped += self._length + 1 < len(plan.seconds)
        return False

    def observe(self, confidences: Sequence[Sequence[float]], accept_lens: Sequence[int]) -> None:
        """`confidences[i]`: of draft i, one per drafting row; `accept_lens`: tokens committed per row, 1..drafts+1."""
        drafts = len(confidences)
        if any(len(row) != len(accept_lens) for row in confidences) or not all(
            1 <= count <= drafts + 1 for count in accept_lens
        ):
            self.ignored += 1
            return
        fade = math.exp(-sum(min(count, drafts) for count in accept_lens) / MEMORY)
        self._drafted = [count * fade for count in self._drafted]
        self._accepted = [count * fade for count in self._accepted]
        for row, count in enumerate(accept_lens):
            for draft in range(min(count, drafts)):  # later ones were not verified
                confidence = confidences[draft][row]
                band = bisect_right(BANDS, confidence)
                self._drafted[band] += 1.0
                self._accepted[band] += draft < count - 1

    def weights_changed(self) -> None:
        """A new policy is as confident as the old one, nearly: keep the idea, let the next steps count."""
        keep = 0.25
        self._drafted = [count * keep for count in self._drafted]
        self._accepted = [count * keep for count in self._accepted]

    def describe(self) -> dict[str, object]:
        return {
            "stopped": self.stopped,
            "pace": round(self.pace(), 4),
            "bands": list(BANDS),
            "acceptance": [round(self._acceptance_of(band), 4) for band in range(len(BANDS) + 1)],
            "evidence": [round(count, 1) for count in self._drafted],
            "ignored": self.ignored,
        }
