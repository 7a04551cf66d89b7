"""Which forwards to time at start-up, so that the first decisions rest on this machine and this model.

Sizes rise by four, and a verify pass with GAMMA drafts has four rows a request: f of the target is met at every size,
by verify passes of the size before as well. What would not fit into the time left is left out, and the trend of the
model goes on from what was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sglang_er.policy.cost_features import Step
from sglang_er.policy.cost_model import CostModel

SIZES = (1, 4, 16, 64)
GAMMA = 3
CONTEXT = 64
# A pass is run three times, and twice or once where it is long; the first run, which makes what is made at first use,
# counts only where it is alone.
_SHORT, _LONG = 0.15, 0.4

# kind, step, gamma, seconds
Timing = tuple[str, Step, int, float]
# Seconds of one forward of this kind, size and draft length.
Measure = Callable[[str, int, int], float]


def time_forwards(measure: Measure, sizes: Sequence[int], gamma_max: int, seconds: float) -> list[Timing]:
    """Plain, draft and verify passes at rising batch `sizes`, as many as fit into `seconds`."""
    return _Seeding(measure, seconds).run(sizes, min(GAMMA, gamma_max))


def seed(model: CostModel, timings: Iterable[Timing]) -> None:
    """Timings (kind, step, gamma, seconds) of a start-up or calibration run, plain steps first."""
    with model.seeding():
        for kind, step, gamma, seconds in sorted(timings, key=lambda timing: timing[0] != "plain"):
            if kind == "plain":
                model.observe_plain(step, seconds)
            elif kind == "draft":
                model.observe_draft(step, seconds)
            else:
                model.observe_verify(step, gamma, seconds)


class _Seeding:
    def __init__(self, measure: Measure, seconds: float) -> None:
        self._measure, self._left = measure, seconds
        self._timings: list[Timing] = []
        # Rows and seconds of the largest pass so far, of the target and of the draft.
        self._largest: dict[bool, tuple[int, float]] = {}

    def run(self, sizes: Sequence[int], gamma: int) -> list[Timing]:
        for size in sizes:
            if not self._time("plain", size, 0):
                break
            if gamma:
                self._time("draft", size, 0)
                self._time("verify", size, gamma)
        return self._timings

    def _time(self, kind: str, size: int, gamma: int) -> bool:
        """False if it may take longer than what is left."""
        rows, drafting = size * (gamma + 1), kind == "draft"
        known = self._largest.get(drafting)
        # Twice the rows take at most twice the time.
        expected = 0.0 if known is None else known[1] * max(1.0, rows / known[0])
        if expected > self._left:
            return False
        runs = 3 if expected < _SHORT else 2 if expected < _LONG and 2 * expected < self._left else 1
        found: list[float] = []
        while len(found) < runs:
            found.append(self._measure(kind, size, gamma))
            self._left -= found[-1]
        kept = found[1:] or found
        self._largest[drafting] = rows, min(kept)
        self._timings += [(kind, Step(size, size * CONTEXT), gamma, seconds) for seconds in kept]
        return True
