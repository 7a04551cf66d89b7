"""What a user is told in one line."""

from __future__ import annotations


class RolloutError(RuntimeError):
    """A rollout cannot go on; the message is one line that says why and where to look."""
