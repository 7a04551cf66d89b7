"""Health of the drafts: says when a weight update has made them useless, so that the rollout does not pay for them.

How many drafts a step gets accepted depends on how many it made, so a step is compared with what the same draft length
brought before: expected accept length = 1 + sum over i of alpha_1 ... alpha_i, with the alphas up to the last update.
The alarm is raised in two cases, each after LEAST_ROWS drafting rows:

sync     since the last weight update less than 1 - `drop` of the accepted drafts that were expected (the watch ends
         after WATCHED_ROWS rows: later changes are those of the workload, and the draft policy's business);
useless  accept length below 1 + LEAST_GAIN, whenever.

Speculation is then off until the next weight update, or for RETRY_STEPS steps if that comes first: no verdict is
final. Where both cases hold, the update is the likelier cause.
"""

from __future__ import annotations

from collections.abc import Sequence

LEAST_ROWS = 256
WATCHED_ROWS = 2048
LEAST_GAIN = 0.05
RETRY_STEPS = 4096
OFF_UNTIL = f"until the next weight update, or for {RETRY_STEPS} steps"
# Rows after which old evidence counts 1/e, and rows that make a baseline.
_MEMORY = 4096.0
_LEAST_BASELINE = 512.0

CAUSES = {
    "sync": "accepted drafts fell to {share:.0%} of what they were before the last weight update. Likely causes: "
    "weights written without an update call (POST /er/requantize after them), an update that was only half sent, "
    "weights that are not finite, or a policy that became much harder to draft for",
    "useless": "accept length is {length:.2f}: drafts are hardly ever accepted. Likely causes: weights that are not "
    "finite, weights written without an update call, memory resumed without new weights",
}


class DraftHealth:
    """Told of every step (`observe`) and every weight update; asked before every step (`allows`)."""

    def __init__(self, gamma_max: int, drop: float = 0.5) -> None:
        """`drop`: the share of accepted drafts whose loss is an alarm, in 0..1; 0 switches the alarm off."""
        self.drop = drop
        self.alarms = 0
        self.cause: str | None = None
        self._drafted = [0.0] * gamma_max
        self._accepted = [0.0] * gamma_max
        self._baseline: list[float] | None = None
        self._left = 0
        self._restart()

    def _restart(self) -> None:
        self._rows = self._gain = self._expected = 0.0

    def configure(self, drop: float) -> None:
        """An administrator changed something: whatever was wrong may be right now."""
        self.drop = drop
        self._left, self.cause = 0, None
        self._restart()

    def weights_changed(self) -> None:
        """Before the first step of the new weights. Several calls for one update are one update."""
        if self._drafted[0] >= _LEAST_BASELINE:
            self._baseline = [a / d if d else 0.0 for a, d in zip(self._accepted, self._drafted)]
            self._drafted, self._accepted = [0.0] * len(self._drafted), [0.0] * len(self._accepted)
        self._left, self.cause = 0, None
        self._restart()

    def allows(self) -> bool:
        """Whether this step may draft."""
        return self._left == 0

    def observe(self, gamma: int, accept_lens: Sequence[int]) -> str | None:
        """A finished step that tried `gamma` drafts per row. Returns the text of an alarm if it raises one."""
        if gamma == 0 or not accept_lens:
            if self._left:
                self._left -= 1
                if not self._left:
                    self._restart()
            return None
        if self._left or self.drop == 0.0:  # a step that was under way when the alarm was raised
            return None
        self._learn(gamma, accept_lens)
        self._rows += len(accept_lens)
        self._gain += sum(accept_lens) - len(accept_lens)
        if self._baseline is not None:
            self._expected += len(accept_lens) * self._expected_gain(gamma)
        return self._verdict()

    def _learn(self, gamma: int, accept_lens: Sequence[int]) -> None:
        fade = max(0.0, 1.0 - len(accept_lens) / _MEMORY)
        for offset in range(min(gamma, len(self._drafted))):
            reached = sum(length > offset for length in accept_lens)
            accepted = sum(length > offset + 1 for length in accept_lens)
            self._drafted[offset] = self._drafted[offset] * fade + reached
            self._accepted[offset] = self._accepted[offset] * fade + accepted

    def _expected_gain(self, gamma: int) -> float:
        gain, survival = 0.0, 1.0
        for alpha in (self._baseline or [])[:gamma]:
            survival *= alpha
            gain += survival
        return gain

    def _verdict(self) -> str | None:
        if self._rows < LEAST_ROWS:
            return None
        share = self._gain / self._expected if self._baseline is not None and self._expected > 0.0 else None
        if share is not None and share < 1.0 - self.drop:
            return self._alarm("sync", CAUSES["sync"].format(share=share))
        if self._gain < LEAST_GAIN * self._rows:
            return self._alarm("useless", CAUSES["useless"].format(length=1.0 + self._gain / self._rows))
        if share is None:
            self._restart()
        elif self._rows >= WATCHED_ROWS:
            self._baseline = None
            self._restart()
        return None

    def _alarm(self, cause: str, text: str) -> str:
        self.alarms += 1
        self.cause, self._left = cause, RETRY_STEPS
        # What the useless drafts did is no baseline, and neither is a time that does not come back: if the policy is
        # simply harder to draft for now, whether drafts still pay is the draft policy's question.
        self._baseline = None
        self._drafted, self._accepted = [0.0] * len(self._drafted), [0.0] * len(self._accepted)
        return text

    def describe(self) -> dict[str, object]:
        return {"alarms": self.alarms, "cause": self.cause, "speculation_off_for_steps": self._left}
