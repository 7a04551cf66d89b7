"""What a draft-length policy is asked, told, and must answer. Pure Python: no torch, no sglang."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol


class StepState(NamedTuple):
    """What is known about the running batch before a step."""

    batch_size: int
    context_tokens: int  # sum of the committed lengths of all requests
    gamma_limit: int  # most that this step can hold: configured maximum, context end, reserved slots
    speculative_rows: int  # requests that may draft; the others take one token from the verify pass
    requests: Sequence[Hashable] = ()  # who may draft, in the order of the batch; empty where nobody tracks them


class StepOutcome(NamedTuple):
    """What a step did."""

    state: StepState
    gamma: int
    accept_lens: Sequence[int]  # tokens committed per request that drafted, bonus included; 1..gamma+1
    seconds: float  # since the end of the forward before; nan where something else ran or waited in between
    draft_seconds: float = float("nan")  # of these, the draft pass; nan where it cannot be told apart
    # [i][r]: largest probability of the distribution that draft i of row r was drawn from; empty where nobody asked
    confidences: Sequence[Sequence[float]] = ()


class Policy(Protocol):
    """Chooses how many tokens to draft, none included, before every step."""

    def choose(self, state: StepState) -> int:
        """Draft length of this step, in 0..state.gamma_limit."""
        ...

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from a finished step; steps arrive in order, possibly a step or two late."""
        ...

    def weights_changed(self) -> None:
        """The policy's weights were updated: acceptance may be another one; costs are not."""
        ...

    def describe(self) -> Mapping[str, object]:
        """What the policy would do and why, in plain values, for /server_info."""
        ...


def clip(gamma: int, state: StepState) -> int:
    """gamma within what the step can hold; 0 where nobody may draft, because plain decode is cheaper than a verify."""
    return max(0, min(gamma, state.gamma_limit)) if state.speculative_rows > 0 else 0
