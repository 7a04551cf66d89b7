"""How property tests run: the same examples everywhere, and no deadline on a busy machine."""

from __future__ import annotations

from hypothesis import Phase, settings


def examples(count: int, shrink: bool = True) -> settings:
    """A decorator: `count` examples. `shrink`: a failing one is made smaller, which takes minutes where one takes
    seconds."""
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])]
    return settings(max_examples=count, derandomize=True, deadline=None, phases=phases)
