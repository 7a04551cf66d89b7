"""What a check is, and the two ways in which it ends early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_er.rollout.conformance.session import Session

# What the promises are, in the words of docs/conformance.md; a failure names one of them.
PROMISES = {
    "contract": "the endpoints and replies that trainers use",
    "L1": "tokens and logprobs are aligned",
    "L2": "logprobs are the policy's",
    "L3": "no more tokens than asked for",
    "L4": "pause (abort) waits for all, later requests wait",
    "L5": "pause (retract, in_place) loses nothing, versions split at a token",
    "L6": "after an update the next token is the new policy's",
    "L7": "a flush empties every cache",
    "L8": "the draft is remade after sleep and updates",
    "L9": "ranks agree",
    "L10": "unsupported options are refused at start",
    "L11": "scoring drafts nothing",
    "L12": "an update needs no more memory",
    "exact": "tokens are distributed as the policy's",
}


class Broken(Exception):
    """A promise is broken; `found` is one line."""

    def __init__(self, promise: str, found: str) -> None:
        super().__init__(f"{promise} ({PROMISES[promise]}): {' '.join(found.split())[:400]}")
        self.promise = promise


class NotHere(Exception):
    """The check says nothing about this server, or may not be run on it; the message is the reason."""


def expect(condition: object, promise: str, found: str) -> None:
    """Raises Broken unless the condition holds."""
    if not condition:
        raise Broken(promise, found)


@dataclass(frozen=True)
class Check:
    """`run` returns a note for the table (what it could not look at, a figure) or None.

    `destructive`: a server that breaks the promise does not survive it.
    """

    id: str
    what: str
    run: Callable[[Session], str | None]
    destructive: bool = False


@dataclass(frozen=True)
class Outcome:
    """`status`: passed, failed or skipped. `reason`: why not passed, or a note.

    `gone`: the server could not be brought back to how it was found.
    """

    check: Check
    status: str
    reason: str
    seconds: float
    gone: bool = False


def by_id(checks: Sequence[Check], only: Sequence[str]) -> list[Check]:
    """The checks named in `only` (all, if it is empty), in the suite's order. Raises ValueError for a name unknown."""
    known = {check.id for check in checks}
    if unknown := sorted(set(only) - known):
        raise ValueError(f"--only {','.join(unknown)}: there is no such check; choose from {', '.join(sorted(known))}")
    return [check for check in checks if not only or check.id in only]
