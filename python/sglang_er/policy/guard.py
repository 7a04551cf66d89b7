"""Never slower: what the committed tokens would have cost without speculation, and what to do when they cost less.

A drafting step that committed n tokens for B requests did the work of n / B plain steps. Saved seconds are the plain
steps' predicted cost minus the measured time. If over the last WINDOW steps speculation lost more than TOLERATED of its
time, it is switched off for `pause` steps, each time for twice as long, until a window that gained.
"""

from __future__ import annotations

import math

WINDOW = 48
TOLERATED = 0.005
FIRST_PAUSE = 64
LONGEST_PAUSE = 4096


class Guard:
    """Asked before every step (`allows`), told after every drafting one (`drafted`)."""

    def __init__(self) -> None:
        self.seconds_saved = 0.0
        self.seconds_drafting = 0.0
        self.switched_off = 0
        self._fresh()
        self._pause = FIRST_PAUSE
        self._left = 0

    def _fresh(self) -> None:
        self._steps = 0
        self._saved = self._spent = 0.0

    def allows(self) -> bool:
        """Whether this step may draft; probes need not ask."""
        return self._left == 0

    def passed(self) -> None:
        """A step without drafting."""
        self._left = max(0, self._left - 1)

    def drafted(self, seconds: float, plain_seconds: float) -> None:
        """`seconds`: of the step; `plain_seconds`: what its tokens would have cost."""
        if not (math.isfinite(seconds) and seconds > 0.0 and math.isfinite(plain_seconds)):
            return
        self.seconds_saved += plain_seconds - seconds
        self.seconds_drafting += seconds
        fade = 1.0 - 1.0 / WINDOW
        # A step that was interrupted for long is no argument against drafting.
        seconds = min(seconds, 4.0 * plain_seconds)
        self._saved = self._saved * fade + plain_seconds - seconds
        self._spent = self._spent * fade + seconds
        self._steps += 1
        if self._steps < WINDOW:
            return
        if self._saved < -TOLERATED * self._spent:
            self.switched_off += 1
            self._left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
            self._fresh()
        else:
            self._pause = FIRST_PAUSE

    def describe(self) -> dict[str, object]:
        return {
            "seconds_saved": round(self.seconds_saved, 4),
            "seconds_drafting": round(self.seconds_drafting, 4),
            "switched_off": self.switched_off,
            "paused_steps_left": self._left,
        }
