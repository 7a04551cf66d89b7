"""Counters of what the steps did, and the attribution of accept counts to the gamma they were drafted with.

SGLang reports accept counts one or two steps after the launch, in launch order and without the draft length; its
own acceptance metrics assume a fixed one. A queue of launched steps makes the counts exact.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from sglang_er.policy import StepOutcome, StepState


class LaunchedStep(NamedTuple):
    """`speculating`: indices of the rows that were drafted for, None = all. Seconds: of the host in the step; since the
    end of the forward before; of the draft pass. The last two are nan where they are not known. `confidences` as in
    StepOutcome."""

    state: StepState
    gamma: int
    speculating: list[int] | None
    host_seconds: float
    seconds: float
    draft_seconds: float = math.nan
    confidences: Sequence[Sequence[float]] = ()


class StepStats:
    """All counters are totals since start-up; clients take differences."""

    def __init__(self) -> None:
        self._pending: deque[LaunchedStep] = deque()
        self._forward_ended: float | None = None
        # By (batch size, gamma). Seconds from the end of the forward before: the scheduler's own work is a step's cost.
        self.cost_steps: Counter[tuple[int, int]] = Counter()
        self.cost_seconds: defaultdict[tuple[int, int], float] = defaultdict(float)
        # By batch size: drafted tokens per row, and seconds of their draft passes, where these are timed.
        self.draft_forwards: Counter[int] = Counter()
        self.draft_seconds: defaultdict[int, float] = defaultdict(float)
        self.steps_by_gamma: Counter[int] = Counter()
        self.seconds_by_gamma: defaultdict[int, float] = defaultdict(float)
        self.request_steps = 0
        self.committed_tokens = 0
        self.drafted_tokens = 0
        self.accepted_drafts = 0
        self.speculating_request_steps = 0
        # accepted_at[i]: drafts at offset i that were accepted; drafted_at[i]: those that were verified at all
        # (all earlier ones accepted). Their ratio is the acceptance alpha_i.
        self.drafted_at: Counter[int] = Counter()
        self.accepted_at: Counter[int] = Counter()

    def launch_step(self, step: LaunchedStep) -> None:
        self.steps_by_gamma[step.gamma] += 1
        self.seconds_by_gamma[step.gamma] += step.host_seconds
        if step.draft_seconds > 0.0:  # not nan
            self.draft_forwards[step.state.speculative_rows] += step.gamma
            self.draft_seconds[step.state.speculative_rows] += step.draft_seconds
        self._pending.append(step)

    def forward_ended(self, now: float, step: tuple[int, int] | None = None) -> float:
        """Seconds since the end of the forward before, nan if they say nothing about this one.

        `step`: batch size and gamma of a decode step; None for a prefill, before which the engine may have idled.
        """
        seconds = math.nan
        if step is not None and self._forward_ended is not None:
            seconds = now - self._forward_ended
            self.cost_steps[step] += 1
            self.cost_seconds[step] += seconds
        self._forward_ended = now
        return seconds

    def finish_step(self, correct_drafts: list[int]) -> StepOutcome | None:
        """Take the counts of the oldest launched step; None if it is unknown (reset in between)."""
        if not self._pending:
            return None
        launched = self._pending.popleft()
        self.request_steps += len(correct_drafts)
        self.committed_tokens += sum(correct_drafts) + len(correct_drafts)
        counts = correct_drafts
        if launched.speculating is not None:
            counts = [correct_drafts[i] for i in launched.speculating]
        lens = [count + 1 for count in counts]
        outcome = StepOutcome(
            launched.state, launched.gamma, lens, launched.seconds, launched.draft_seconds, launched.confidences
        )
        if launched.gamma == 0:
            return outcome
        self.speculating_request_steps += len(counts)
        self.drafted_tokens += launched.gamma * len(counts)
        self.accepted_drafts += sum(counts)
        # By value, not by request: a batch of 64 holds at most gamma + 1 different counts.
        for accepted, requests in Counter(counts).items():
            for offset in range(min(accepted + 1, launched.gamma)):
                self.drafted_at[offset] += requests
                self.accepted_at[offset] += requests if offset < accepted else 0
        return outcome

    def forget_pending(self) -> None:
        """The cache was flushed: the engine is idle, nothing launched is still to be processed."""
        self._pending.clear()

    def costs(self) -> dict[str, dict[str, dict[str, float]]]:
        """Batch size -> gamma -> steps and seconds, as JSON takes it."""
        table: dict[str, dict[str, dict[str, float]]] = {}
        for (size, gamma), steps in sorted(self.cost_steps.items()):
            seconds = round(self.cost_seconds[size, gamma], 6)
            table.setdefault(str(size), {})[str(gamma)] = {"steps": steps, "seconds": seconds}
        return table

    def describe(self) -> dict[str, object]:
        speculating = self.speculating_request_steps
        return {
            "steps_by_gamma": {str(g): n for g, n in sorted(self.steps_by_gamma.items())},
            "seconds_by_gamma": {str(g): round(s, 6) for g, s in sorted(self.seconds_by_gamma.items())},
            "request_steps": self.request_steps,
            "committed_tokens": self.committed_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_drafts": self.accepted_drafts,
            "speculating_request_steps": speculating,
            "accept_length": (self.accepted_drafts + speculating) / speculating if speculating else None,
            "drafted_at": [self.drafted_at[i] for i in range(len(self.drafted_at))],
            "accepted_at": [self.accepted_at[i] for i in range(len(self.drafted_at))],
            "alpha": [round(self.accepted_at[i] / self.drafted_at[i], 4) for i in range(len(self.drafted_at))],
            "costs": self.costs(),
            "draft_costs": {
                str(size): {"forwards": forwards, "seconds": round(self.draft_seconds[size], 6)}
                for size, forwards in sorted(self.draft_forwards.items())
            },
        }
