"""Raises the weight epoch after every call that writes the policy's weights, whichever way it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Methods of a model runner's weight updater that write weights. They are reached for every selector ("target",
# "draft", "all") and without any draft runner.
WRITERS = frozenset(
    {
        "update_weights_from_disk",
        "update_weights_from_tensor",
        "update_weights_from_ipc",
        "load_weights_from_distributed",
        "end_weight_update",
    }
)


OPENER, CLOSER = "begin_weight_update", "end_weight_update"


class WatchedWeightUpdater:
    """Stands in for `model_runner.weight_updater` (a slotted class whose instances take no wrapped methods).

    `changed()` is called after a writer returns or raises: a failed update may have written part of the weights.
    `session_open`: between begin_weight_update and end_weight_update, where the weights may be half new.
    """

    def __init__(self, inner: Any, changed: Callable[[], None]) -> None:
        missing = sorted(name for name in WRITERS | {OPENER} if not callable(getattr(inner, name, None)))
        if missing:
            raise RuntimeError(f"sglang-er: SGLang's weight updater lacks {', '.join(missing)}: unsupported version")
        self._inner = inner
        self._changed = changed
        self.session_open = False

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        return self._watched(name, attribute) if name in WRITERS or name == OPENER else attribute

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.session_open |= name == OPENER
            try:
                result = method(*args, **kwargs)
            finally:
                if name in WRITERS:
                    self._changed()
            # An end that raised leaves SGLang's session open as well.
            self.session_open &= name != CLOSER
            return result

        return call
