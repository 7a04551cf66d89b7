"""Steps with another draft length than the best known one: how much they may cost, and when a plain one is due."""

from __future__ import annotations

import math
from typing import NamedTuple

SHARE = 0.004  # of the time
# Plain steps whose share may be spent at the start, when nothing is known, and have saved up later on.
_FIRST, _MOST = 500.0, 1500.0


class Probe(NamedTuple):
    """A step that was not the best known one. `worth`: seconds in which the best one brings its tokens."""

    batch_size: int
    gamma: int
    price: float  # expected loss in seconds, paid
    worth: float


class ProbeBudget:
    """Seconds that may be lost. A probe pays what it is expected to lose, and the rest once it is known: dear surprises
    are paid back before the next probe."""

    def __init__(self, share: float) -> None:
        self.seconds = 0.0
        self._first = 0.0
        self.probes = 0
        self._share = share
        self._open: Probe | None = None

    def begin(self, plain_seconds: float) -> None:
        """The first step was decided; `plain_seconds`: of one request."""
        self.seconds = self._first = _FIRST * self._share * plain_seconds

    def earn(self, seconds: float, plain_seconds: float) -> None:
        if math.isfinite(seconds) and seconds > 0.0:
            self.seconds = min(self.seconds + self._share * seconds, _MOST * self._share * plain_seconds)

    def pay(self, probe: Probe) -> None:
        self.seconds -= probe.price
        self.probes += 1
        self._open = probe

    def settle(self, batch_size: int, gamma: int, seconds: float) -> None:
        """A step has ended; what was probed may have taken longer than expected."""
        probe = self._open
        if probe is None or (probe.batch_size, probe.gamma) != (batch_size, gamma):
            return
        self._open = None
        if math.isfinite(seconds) and seconds > 0.0:
            self.seconds = max(self.seconds - max(0.0, seconds - probe.worth) + probe.price, -self._first)


class PlainChecks:
    """Where every step drafts, nobody sees what a plain one takes, which is what the gain is measured by. One is due
    after a few drafting steps at batches of about this size, then after ever more of them."""

    FIRST, GROWTH, LONGEST = 4, 3, 128
    # Where drafting gains that much, plain decode would have to be far cheaper than believed.
    CLEAR_GAIN, CLEAR_FACTOR = 2.0, 4

    def __init__(self) -> None:
        self._classes: dict[int, tuple[int, int]] = {}  # bits of the batch size -> drafting steps since, interval

    def due(self, batch_size: int, gain: float) -> bool:
        """`gain`: tokens per second of the best draft length over those of a plain step."""
        since, interval = self._classes.get(batch_size.bit_length(), (0, self.FIRST))
        return since >= (self.CLEAR_FACTOR * interval if gain >= self.CLEAR_GAIN else interval)

    def drafted(self, batch_size: int) -> None:
        since, interval = self._classes.get(batch_size.bit_length(), (0, self.FIRST))
        self._classes[batch_size.bit_length()] = since + 1, interval

    def spend(self, batch_size: int) -> None:
        """A plain step was chosen because it was due."""
        _, interval = self._classes.get(batch_size.bit_length(), (0, self.FIRST))
        self._classes[batch_size.bit_length()] = 0, min(self.GROWTH * interval, self.LONGEST)

    def plain(self, batch_size: int) -> None:
        """A plain step has ended, whyever it was one."""
        _, interval = self._classes.get(batch_size.bit_length(), (0, self.FIRST))
        self._classes[batch_size.bit_length()] = 0, interval


class Tried:
    """Which draft lengths were tried lately at batches of about this size. The cost model draws its lines through the
    others, and is sure of them as long as costs have no kinks but those it expects."""

    LONG_AGO = 256  # steps of such batches

    def __init__(self, gamma_max: int) -> None:
        self._fresh = [0] * (gamma_max + 1)
        self._since: dict[int, list[int]] = {}  # bits of the batch size -> such steps since each draft length

    def step(self, batch_size: int, gamma: int) -> None:
        size = batch_size.bit_length()
        since = [count + 1 for count in self._since.get(size, self._fresh)]
        if gamma < len(since):  # a late outcome of another policy may be longer
            since[gamma] = 0
        self._since[size] = since

    def long_ago(self, batch_size: int, gamma: int) -> bool:
        return self._since.get(batch_size.bit_length(), self._fresh)[gamma] >= self.LONG_AGO
