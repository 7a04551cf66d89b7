"""The rule of EfficientRollout (arXiv 2606.18967), for comparison: a roofline that switches drafting on once per
rollout, and a ladder of draft lengths that moves between rollouts.

Switch, before every step of a rollout. T are roofline times from constants that were fitted once per model and GPU:

  speed_up = L * T_T / (gamma * T_D + T_V)        drafting begins when speed_up >= 1 + margin, and then never ends

with the batch size and the mean context of now. L is the mean accept length of the rollout before, or gamma where
nothing was drafted yet. No decision is made before the batch has been larger than `ramp` once. The step that switches
drafting on is still a plain one.

Ladder, between rollouts: one rung up after `patience` rollouts in a row with accepted / drafted >= .94, one down after
as many with <= .85. L stays that of the rung before for one rollout, as it does in the published code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sglang_er.policy.base import StepOutcome, StepState, clip

LADDER = (5, 7, 9, 11)
RAISE_AT, LOWER_AT, PATIENCE = 0.94, 0.85, 2
MARGIN = 0.05
RAMP = 32  # the authors' setting for 128 requests in a replica

# Names of the constants in the authors' files -> fields of `Roofline`.
_FIELDS = {
    "W_t": "target_bytes",
    "W_d": "draft_bytes",
    "C_dense": "dense_flops",
    "C_attn": "attention_flops",
    "kappa_eff": "kv_bytes",
    "BW_eff": "bandwidth",
    "F_eff": "flops",
    "eta_d": "draft_slowdown",
    "c_T": "plain_us",
    "c_D": "draft_us",
    "c_V": "verify_us",
}


@dataclass(frozen=True)
class Roofline:
    """Four constants of a model and seven fitted ones: `kv_bytes` to the end. Bytes, FLOPs, per second; the last three
    are microseconds per request and pass."""

    target_bytes: float  # all weights of the target
    draft_bytes: float  # and of the drafter
    dense_flops: float  # of a token in the linear layers
    attention_flops: float  # of a token for one token of its context
    kv_bytes: float  # per token of context
    bandwidth: float
    flops: float
    draft_slowdown: float  # of the drafter's weight reads against `bandwidth`
    plain_us: float
    draft_us: float
    verify_us: float

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Roofline:
        """Raises ValueError with one line if a constant is missing or no positive number."""
        found: dict[str, float] = {}
        for name, attribute in _FIELDS.items():
            value = values.get(name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"constant {name} must be a number of at least 0, got {value!r}")
            found[attribute] = float(value)
        if not (found["bandwidth"] and found["flops"]):
            raise ValueError("constants BW_eff and F_eff must be above 0")
        return cls(**found)

    def plain(self, batch: float, context: float) -> float:
        return self._pass(self.target_bytes, batch, context, 1, self.plain_us)

    def draft(self, batch: float, context: float) -> float:
        return self._pass(self.draft_slowdown * self.draft_bytes, batch, context, 1, self.draft_us)

    def verify(self, batch: float, context: float, gamma: int) -> float:
        return self._pass(self.target_bytes, batch, context, gamma + 1, self.verify_us)

    def speed_up(self, batch: float, context: float, gamma: int, accept_length: float) -> float:
        cycle = gamma * self.draft(batch, context) + self.verify(batch, context, gamma)
        return accept_length * self.plain(batch, context) / cycle

    def _pass(self, weights: float, batch: float, context: float, tokens: int, per_request_us: float) -> float:
        memory = (weights + self.kv_bytes * batch * context) / self.bandwidth
        compute = tokens * batch * (self.dense_flops + context * self.attention_flops) / self.flops
        return max(memory, compute) + per_request_us * batch * 1e-6


class PaperPolicy:
    """`gamma`: the rung to begin with."""

    def __init__(
        self,
        roofline: Roofline,
        gamma: int = 7,
        ladder: Sequence[int] = LADDER,
        ramp: int = RAMP,
        margin: float = MARGIN,
    ) -> None:
        if gamma not in ladder or list(ladder) != sorted(set(ladder)):
            raise ValueError(f"the draft length {gamma} must be a rung of the rising ladder {list(ladder)}")
        self._roofline, self._gamma, self._ladder, self._ramp, self._margin = roofline, gamma, ladder, ramp, margin
        self._accept_length = float(gamma)
        self._ramped = self._drafting = False
        self._high = self._low = 0  # rollouts in a row
        self._drafts = self._drafted = self._accepted = 0  # in this rollout

    def choose(self, state: StepState) -> int:
        if self._drafting:
            return clip(self._gamma, state)
        self._ramped = self._ramped or state.batch_size > self._ramp
        if self._ramped:
            context = state.context_tokens // max(1, state.batch_size)
            gain = self._roofline.speed_up(state.batch_size, context, self._gamma, self._accept_length)
            self._drafting = gain >= 1 + self._margin
        return 0

    def observe(self, outcome: StepOutcome) -> None:
        if outcome.gamma > 0:
            self._drafts += len(outcome.accept_lens)
            self._drafted += outcome.gamma * len(outcome.accept_lens)
            self._accepted += sum(outcome.accept_lens) - len(outcome.accept_lens)

    def weights_changed(self) -> None:
        """A new rollout."""
        if self._drafts:
            self._accept_length = 1 + self._accepted / self._drafts
            self._climb(self._accepted / self._drafted)
        self._ramped = self._drafting = False
        self._drafts = self._drafted = self._accepted = 0

    def _climb(self, rate: float) -> None:
        self._high = self._high + 1 if rate >= RAISE_AT else 0
        self._low = self._low + 1 if rate <= LOWER_AT else 0
        move = (self._high >= PATIENCE) - (self._low >= PATIENCE)
        if move:
            rung = self._ladder.index(self._gamma) + move
            self._gamma = self._ladder[max(0, min(rung, len(self._ladder) - 1))]
            self._high = self._low = 0

    def describe(self) -> dict[str, object]:
        return {
            "policy": "paper",
            "gamma": self._gamma,
            "drafting": self._drafting,
            "accept_length": round(self._accept_length, 3),
        }
