"""Keeps the twin with the policy: knows of every change of the weights, and remakes the twin before it drafts."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from sglang_er.engine import compat
from sglang_er.engine.saved_memory import WEIGHTS, SavedMemory
from sglang_er.engine.sync_metrics import make_metrics
from sglang_er.twin.row_samples import RowSamples

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.config import RolloutConfig
    from sglang_er.engine.controller import Controller
    from sglang_er.twin.twin import Twin

logger = logging.getLogger(__name__)


class WeightSync:
    """One per worker. The controller is told of every change, so that it can forget what it knew of the old twin.

    Everything here runs in the scheduler's thread, between steps: an update, a requantization and a draft pass never
    overlap, and a draft pass sees a twin that is whole.
    """

    def __init__(
        self, runner: ModelRunner, twin: Twin, config: RolloutConfig, controller: Controller, memory: SavedMemory
    ) -> None:
        self.twin = twin
        self.memory = memory
        self.samples = RowSamples(twin.layers)
        self.undeclared_writes = 0
        self._controller = controller
        self._plain_reported = self._stale_reported = False
        self._checked = time.monotonic()
        self._device = str(runner.device)
        self._metrics = make_metrics(runner)
        self._watch = compat.adapter().watch_weights(runner, self.changed)
        self.configure(config)
        self.samples.take()
        self._publish()

    def configure(self, config: RolloutConfig) -> None:
        """Options changed; the server is idle."""
        self.config = config
        # Without requantization the twin is stale on purpose.
        self.twin.check_epochs = config.check_epochs and config.requantize

    # -- the policy's weights changed ----------------------------------------------------------------------------

    def changed(self) -> None:
        """Weights were written, or may have been: by an update that succeeded or failed, or behind our back."""
        self.twin.policy_changed()
        self._controller.weights_changed()
        self._publish()

    def continued(self) -> None:
        """continue_generation: the last that is heard of a trainer that writes parameters itself.

        Only marks the twin: the KV pool and captured graphs may still be released at this time.
        """
        if self.config.requantize_on_continue and not self.twin.stale:
            self.changed()

    # -- before a draft ------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the twin may draft now; it is remade first if the policy's weights changed since it was made."""
        if self._watch.session_open or self.memory.away:
            if not self._plain_reported:
                what = "the weight update that has begun is ended"
                if self.memory.away:
                    what = f"memory is back ({', '.join(sorted(self.memory.away))} released)"
                logger.warning("sglang-er: plain decoding until %s", what)
                self._plain_reported = True
            return False
        self._plain_reported = False
        if self._controller.health.allows() != self._allowed:
            self._publish()
        self._look_for_undeclared_writes()
        if not self.twin.stale:
            return True
        if self.config.requantize:
            self._requantize()
        elif not self._stale_reported:
            logger.warning("sglang-er: requantize=false: drafting with a twin of an older policy (tests only)")
            self._stale_reported = True
        return True

    def requantize_now(self) -> dict[str, Any]:
        """POST /er/requantize: remake the twin whatever the epochs say. Raises RuntimeError when weights are not all
        there."""
        released = WEIGHTS in self.memory.away
        if self._watch.session_open or released:
            what = "the weights are released" if released else "a weight update session is open"
            raise RuntimeError(f"{what}: requantization would read weights that are not whole")
        self.changed()
        before = self.twin.requantize_seconds
        # A draft pass that was launched may still be reading the packed weights.
        torch.get_device_module(self._device).synchronize()
        self._requantize()
        return {"seconds": round(self.twin.requantize_seconds - before, 6), "weight_epoch": self.twin.weight_epoch}

    def _requantize(self) -> None:
        before = self.twin.requantize_seconds
        self.twin.requantize()
        self.samples.take()
        self._checked = time.monotonic()
        spent = 1e3 * (self.twin.requantize_seconds - before)
        logger.info("sglang-er: twin remade for weight epoch %d in %.1f ms", self.twin.weight_epoch, spent)
        self._publish()

    def _look_for_undeclared_writes(self) -> None:
        period, now = self.config.weight_check_seconds, time.monotonic()
        if not period or self.twin.stale or now - self._checked < period:
            return
        self._checked = now
        layers = self.samples.changed()
        if not layers:
            return
        self.undeclared_writes += 1
        logger.warning(
            "sglang-er: weights were written without an update call (%d of %d sampled layers differ, %s first): the "
            "twin is remade; POST /er/requantize after such writes",
            len(layers),
            len(self.twin.layers),
            layers[0],
        )
        self.changed()

    # -- what is shown -------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        health = self._controller.health
        self._allowed = health.allows()
        self._metrics.publish(self.twin, self.undeclared_writes, health)

    def describe(self) -> dict[str, Any]:
        """Beside the twin's own figures in /server_info and /er/state."""
        return {
            **self.twin.describe(),
            "session_open": self._watch.session_open,
            "weights_released": WEIGHTS in self.memory.away,
            "undeclared_writes": self.undeclared_writes,
        }
