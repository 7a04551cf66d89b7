"""The twin as a whole: its layers, the draft switch, and the weight epoch that keeps it from going stale."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sglang_er.twin.packed_linear import PackedLinear


class StaleTwin(AssertionError):
    """A draft pass began with a twin of another policy: a bug of ours, never of a trainer."""


@dataclass
class Twin:
    """`weight_epoch` counts updates of the policy, `twin_epoch` is the one the packed weights were made from.

    `drafting` is what the dual-precision layers look at: True only inside `draft_pass()`. `check_epochs`: a draft pass
    of a stale twin is an error.
    """

    layers: list[PackedLinear] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    drafting: bool = False
    check_epochs: bool = False
    weight_epoch: int = 1
    twin_epoch: int = 1
    requantizations: int = 0
    requantize_seconds: float = 0.0

    def policy_changed(self) -> None:
        """Every weight-update path of the engine ends up here, once or more per update."""
        self.weight_epoch += 1

    @property
    def stale(self) -> bool:
        return self.twin_epoch != self.weight_epoch

    def requantize(self) -> None:
        """Remake every layer from the live weights; the twin then belongs to the current weight epoch."""
        started = time.perf_counter()
        for layer in self.layers:
            layer.repack()
        self.twin_epoch = self.weight_epoch
        self.requantizations += 1
        self.requantize_seconds += time.perf_counter() - started

    def about_to_draft(self) -> None:
        """At the beginning of every draft pass, whoever runs it. Raises StaleTwin if `check_epochs`."""
        if self.check_epochs and self.stale:
            raise StaleTwin(f"the twin of weight epoch {self.twin_epoch} drafts at weight epoch {self.weight_epoch}")

    @contextmanager
    def draft_pass(self) -> Iterator[None]:
        """Inside, the dual-precision layers compute with the twin's weights."""
        self.drafting = True
        try:
            yield
        finally:
            self.drafting = False

    def describe(self) -> dict[str, object]:
        weights = sum(layer.quantized_weights for layer in self.layers)
        nbytes = sum(layer.nbytes for layer in self.layers)
        return {
            "layers": len(self.layers),
            "layers_kept_exact": list(self.skipped),
            "quantized_weights": weights,
            "nbytes": nbytes,
            "layouts": dict(Counter(layer.layout for layer in self.layers)),
            "bits_per_weight": round(8 * nbytes / weights, 4) if weights else None,
            "clip_search": any(layer.clip_search for layer in self.layers),
            "weight_epoch": self.weight_epoch,
            "twin_epoch": self.twin_epoch,
            "requantizations": self.requantizations,
            "requantize_seconds": round(self.requantize_seconds, 6),
        }
