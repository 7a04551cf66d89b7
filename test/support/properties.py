"""How property tests run: the same examples everywhere, and no deadline on a busy machine."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> settings:
    """A decorator: `count` examples."""
    return settings(max_examples=count, derandomize=True, deadline=None)
