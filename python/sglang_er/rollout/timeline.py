"""What happens over the course of a block: requests in flight, draft length, tokens per second; and its picture."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.steps import Steps

Result = TypeVar("Result")
# Two hues that differ in lightness too; plain decode is the quieter one.
_COLORS = {"plain": "#8a8f98", "speculative": "#1f6fd6"}


class Row(NamedTuple):
    """An interval that ends `seconds` after the block's start. `gamma`: mean over its steps, None without a step."""

    seconds: float
    active: int
    gamma: float | None
    tokens_per_second: float


class Gauge:
    """Counts the requests in flight, as the client sees them."""

    def __init__(self) -> None:
        self.active = 0
        self._lock = threading.Lock()

    def around(self, job: Callable[[], Result]) -> Callable[[], Result]:
        def counted() -> Result:
            self._change(1)
            try:
                return job()
            finally:
                self._change(-1)

        return counted

    def _change(self, by: int) -> None:
        with self._lock:
            self.active += by


class Sampler:
    """Looks at counters and gauge every `interval` seconds in a thread of its own, from `with` to its end."""

    def __init__(self, state: Callable[[], Mapping[str, Any]], gauge: Gauge, interval: float) -> None:
        self._state, self._gauge, self._interval = state, gauge, interval
        self._looks: list[tuple[float, int, Steps]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.perf_counter()
        last = False
        while True:
            # A server that is gone ends the measurement elsewhere, with its cause.
            with suppress(RolloutError):
                steps = Steps.total(self._state())
                self._looks.append((time.perf_counter() - started, self._gauge.active, steps))
            if last:
                return
            last = self._stop.wait(self._interval)  # one more look at the end: a short block has hardly another

    def rows(self) -> list[Row]:
        return [_row(earlier, later) for earlier, later in zip(self._looks, self._looks[1:])]


def _row(earlier: tuple[float, int, Steps], later: tuple[float, int, Steps]) -> Row:
    steps = later[2].since(earlier[2])
    count = sum(steps.steps_by_gamma.values())
    gamma = sum(gamma * n for gamma, n in steps.steps_by_gamma.items()) / count if count else None
    pace = steps.committed_tokens / max(later[0] - earlier[0], 1e-9)
    return Row(round(later[0], 3), later[1], None if gamma is None else round(gamma, 3), round(pace, 2))


def require_plotting() -> None:
    """Raises ValueError if there is nothing to draw with: better before a measurement than after it."""
    if util.find_spec("matplotlib") is None:
        raise ValueError("--png needs matplotlib, which is not installed: pip install 'sglang-er[bench]'")


def draw(path: Path, arms: Mapping[str, Sequence[Row]], title: str) -> None:
    """Three panels over one time axis; `arms`: name (plain, speculative) -> rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 1, figsize=(9, 7), sharex=True, layout="constrained")
    for name in sorted(arms):
        rows = list(arms[name])
        # A row says what happened up to its time.
        rows[:0] = [row._replace(seconds=0.0) for row in rows[:1]]
        seconds = [row.seconds for row in rows]
        columns = (
            [row.active for row in rows],
            [float("nan") if row.gamma is None else row.gamma for row in rows],
            [row.tokens_per_second for row in rows],
        )
        for panel, values in zip(panels, columns, strict=True):
            panel.step(seconds, values, where="pre", color=_COLORS.get(name), linewidth=1.6, label=name)
    for panel, label in zip(panels, ("requests in flight", "tokens drafted per step", "tokens/s"), strict=True):
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#e4e6ea", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(title, loc="left", fontsize=10)
    panels[0].legend(frameon=False, loc="upper right")
    panels[-1].set_xlabel("seconds since the batch was sent")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
