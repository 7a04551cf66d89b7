"""Runs checks one after the other, each on the server as it was found; table and JSON."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sglang_er.rollout.conformance import (
    distribution,
    frameworks,
    generation,
    interruption,
    memory,
    server,
    weight_sync,
)
from sglang_er.rollout.conformance.check import Broken, Check, NotHere, Outcome
from sglang_er.rollout.conformance.session import Session
from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.report import table

_ROOMS = (generation, interruption, weight_sync, memory, server, frameworks, distribution)
CHECKS: tuple[Check, ...] = tuple(sorted((check for room in _ROOMS for check in room.CHECKS), key=lambda c: c.id))


def in_order(checks: Iterable[Check]) -> list[Check]:
    """Those last that may end the server."""
    return sorted(checks, key=lambda check: check.destructive)


def run_one(session: Session, check: Check) -> Outcome:
    """The check's outcome; the server is afterwards as it was found, or the outcome says that it is gone."""
    started = time.monotonic()

    def outcome(status: str, reason: str, gone: bool = False) -> Outcome:
        return Outcome(check, status, " ".join(reason.split()), time.monotonic() - started, gone)

    if check.destructive and not session.options.destructive:
        return outcome("skipped", "may end the server: --destructive")
    try:
        found = outcome("passed", check.run(session) or "")
    except NotHere as reason:
        found = outcome("skipped", str(reason))
    except Broken as broken:
        found = outcome("failed", str(broken))
    except (RolloutError, KeyError, TypeError, IndexError, ValueError, OSError) as error:
        # A reply of an unexpected shape, or none.
        found = outcome("failed", f"{type(error).__name__}: {error}")
    try:
        session.restore()
    except RolloutError as error:
        return outcome("failed", "; ".join([*([found.reason] if found.status == "failed" else []), str(error)]), True)
    return found


def run_all(session: Session, checks: Sequence[Check], tell: Callable[[Outcome], None]) -> list[Outcome]:
    """All of them; after a server that could not be brought back, the rest is skipped."""
    found: list[Outcome] = []
    gone = ""
    for check in in_order(checks):
        found.append(Outcome(check, "skipped", gone, 0.0) if gone else run_one(session, check))
        if found[-1].gone:
            gone = f"the server did not survive {check.id}"
        tell(found[-1])
    return found


def rows(outcomes: Sequence[Outcome]) -> str:
    """The table, then what failed and why others were skipped."""
    head = ("check", "what", "outcome", "seconds")
    ranked = sorted(outcomes, key=lambda outcome: outcome.check.id)
    width = max(len(outcome.check.what) for outcome in ranked)
    cells = [(o.check.id, o.check.what.ljust(width), o.status, f"{o.seconds:.1f}") for o in ranked]
    lines = table([head, *cells])
    reasons = [f"{o.check.id} {o.status}: {o.reason}" for o in ranked if o.reason]
    count = Counter(outcome.status for outcome in ranked)
    total = ", ".join(f"{count[status]} {status}" for status in ("passed", "failed", "skipped") if count[status])
    return "\n".join([*lines, "", *reasons, "", total])


def as_json(session: Session, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What `--json` writes."""
    names = ("version", "dtype", "device", "tp_size", "speculative_algorithm", "launch_command")
    return {
        "url": session.url,
        "server": {name: session.info.get(name) for name in names},
        "checks": [
            {"id": o.check.id, "what": o.check.what, "status": o.status, "reason": o.reason, "seconds": o.seconds}
            for o in outcomes
        ],
    }
