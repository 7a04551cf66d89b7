"""Progress on a terminal (one line that is rewritten) and in a log (a line now and then)."""

from __future__ import annotations

import sys
import time
from typing import TextIO

# A log needs to show that something moves, not every second of it.
LOG_INTERVAL_S = 10.0


class Progress:
    """`update` shows what is going on, `note` leaves a line for good; both carry the seconds since the start."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty()
        self._started = time.monotonic()
        self._shown = 0.0
        self._open = False

    def update(self, text: str) -> None:
        if self._terminal:
            self._stream.write(f"\r\x1b[K{self._stamp()} {text}"[:160])
            self._open = True
        elif time.monotonic() - self._shown >= LOG_INTERVAL_S:
            self._stream.write(f"{self._stamp()} {text}\n")
        else:
            return
        self._shown = time.monotonic()
        self._stream.flush()

    def note(self, text: str) -> None:
        self.close()
        self._stream.write(f"{self._stamp()} {text}\n")
        self._shown = time.monotonic()
        self._stream.flush()

    def close(self) -> None:
        """End the line that is being rewritten."""
        if self._open:
            self._stream.write("\r\x1b[K")
            self._open = False
            self._stream.flush()

    def _stamp(self) -> str:
        return f"[{time.monotonic() - self._started:4.0f} s]"
