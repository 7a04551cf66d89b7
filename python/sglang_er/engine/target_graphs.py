"""Which CUDA graph, if any, a target forward replays, and which attention backend it goes through.

SGLang records one decode graph per batch size, of one width, and replays it for whatever decode batch comes: a plain
step would run in a verify graph. Here what SGLang records at start-up is its plain decode (gamma = 0 costs what it
costs without us), and every verify width has a graph runner and an attention backend of its own. Where a backend reads
the width once, when it is made, passes without a graph have one for each width as well. Who runs a forward binds what
belongs to it.

Wide passes of large batches are not recorded: at MOST_ROWS rows a pass is arithmetic, and launching it is no cost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sglang_er.engine.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

MOST_ROWS = 512
# Widths are recorded in this order until memory or time is used up; `gamma_max` and below.
_ORDER = (3, 1, 5, 2, 7, 4, 6)


class Recorded(NamedTuple):
    """What `capture` made for one width."""

    attention: Any
    graphs: Any


class TargetGraphs:
    """`runner`: SGLang's ModelRunner; `capture(width, batch sizes)` records, and is given only where graphs are used;
    `memory()`: bytes in use. `budget`: bytes and seconds for all widths. `needs(width, batch sizes)`: bytes that are
    known to be taken before they are. `attention(width)` makes a backend for passes that are not recorded, where the
    runner's own knows another width."""

    def __init__(
        self,
        runner: Any,
        capture: Callable[[int, list[int]], Recorded] | None = None,
        memory: Callable[[], int] = lambda: 0,
        budget: tuple[int, float] = (0, 0.0),
        needs: Callable[[int, list[int]], int] = lambda width, sizes: 0,
        attention: Callable[[int], Any] | None = None,
    ) -> None:
        self._runner, self._capture, self._memory, self._budget = runner, capture, memory, budget
        self._needs, self._attention = needs, attention
        self._recorded: dict[int, Recorded] = {}
        self._unrecorded: dict[int, Any] = {}
        self.counts = {"verify_recorded": 0, "verify_eager": 0}
        self.nbytes, self.seconds = 0, 0.0

    def record(self, gamma_max: int, batch_sizes: Sequence[int], ranks: Ranks = ALONE) -> None:
        """All widths that the budget allows on every rank."""
        if self._capture is None:
            return
        order = [gamma for gamma in _ORDER if gamma <= gamma_max]
        order += [gamma for gamma in range(1, gamma_max + 1) if gamma not in order]
        before, began = self._memory(), time.perf_counter()
        for gamma in order:
            width = gamma + 1
            sizes = [size for size in batch_sizes if size * width <= MOST_ROWS]
            if sizes and not ranks.agreed(self.nbytes + self._needs(width, sizes) <= self._budget[0]):
                break
            if sizes:
                self._recorded[width] = self._capture(width, sizes)
            self.nbytes, self.seconds = self._memory() - before, time.perf_counter() - began
            if not ranks.agreed(self.nbytes <= self._budget[0] and self.seconds <= self._budget[1]):
                break
        missing = sorted(gamma for gamma in order if gamma + 1 not in self._recorded)
        logger.info(
            "sglang-er: verify graphs of draft lengths %s: %.0f MB, %.1f s%s",
            sorted(width - 1 for width in self._recorded),
            self.nbytes / 1e6,
            self.seconds,
            f"; {missing} run without graphs (graph_memory_mb, graph_seconds)" if missing else "",
        )

    @contextmanager
    def verifying(self, width: int, batch_size: int) -> Iterator[None]:
        """Around a verify pass of that many tokens a request."""
        if self._capture is None and self._attention is None:
            yield
            return
        found = self._recorded.get(width)
        fits = found is not None and batch_size * width <= MOST_ROWS
        self.counts["verify_recorded" if fits else "verify_eager"] += 1
        attention = found.attention if found else self._attention_of(width)
        with bound(self._runner, attention, found.graphs if found and fits else None):
            yield

    def _attention_of(self, width: int) -> Any:
        """Made at first use: draft lengths may be changed while the server runs. None: the runner's own."""
        if self._attention is not None and width not in self._unrecorded:
            self._unrecorded[width] = self._attention(width)
        return self._unrecorded.get(width)

    @property
    def attentions(self) -> tuple[Any, ...]:
        """Attention backends beside the runner's own."""
        return (*(recorded.attention for recorded in self._recorded.values()), *self._unrecorded.values())

    def describe(self) -> dict[str, object] | None:
        if self._capture is None:
            return None
        gammas = sorted(width - 1 for width in self._recorded)
        return {"gammas": gammas, **self.counts, "nbytes": self.nbytes, "recording_seconds": round(self.seconds, 3)}


@contextmanager
def bound(runner: Any, attention: Any, graphs: Any) -> Iterator[None]:
    """Forwards of `runner` use this attention backend (None: its own) and these decode graphs (None: none)."""
    before = runner.attn_backend, runner.decode_cuda_graph_runner
    runner.attn_backend = attention or before[0]
    runner.decode_cuda_graph_runner = graphs
    try:
        yield
    finally:
        runner.attn_backend, runner.decode_cuda_graph_runner = before
