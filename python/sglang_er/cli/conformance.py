"""`sglang-er conformance`: what RL trainers rely on, checked against a server that runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_er.cli.common import check_folder, exit_code, write_json

if TYPE_CHECKING:
    from sglang_er.rollout.conformance.check import Outcome
    from sglang_er.rollout.conformance.session import Options
    from sglang_er.rollout.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("--url", required=True, metavar="URL", help="a server that runs and is idle; any SGLang server")
    parser.add_argument("--only", default="", metavar="C01,C07", help="these checks (default: all)")
    parser.add_argument(
        "--weights",
        default="",
        metavar="DIR[,DIR]",
        help="allow updates: another checkpoint of the server's architecture, and the server's own where it has moved",
    )
    parser.add_argument("--destructive", action="store_true", help="run those too that end a server that breaks them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome")


def run(args: argparse.Namespace) -> int:
    """0 if nothing failed, 1 if a check or the server did, 2 for a choice that cannot be, 130 on Ctrl-C."""
    from sglang_er.rollout.progress import Progress

    progress = Progress(sys.stderr)
    return exit_code("conformance", progress, lambda: _examine(args, progress))


def options_of(args: argparse.Namespace) -> Options:
    """What the suite may do, and with what it sends weights."""
    from sglang_er.rollout.conformance.session import Options

    weights = [path for path in args.weights.split(",") if path]
    if len(weights) > 2:
        raise ValueError(f"--weights takes another checkpoint and the server's own, got {len(weights)} folders")
    if not weights:
        return Options(destructive=args.destructive)
    try:
        # SGLang's own serializer and process groups; importing them takes seconds.
        from sglang_er.engine.weight_sender import WeightSender
    except ImportError as error:
        reason = f"tensors are sent with SGLang's own code, which cannot be imported here: {error}"
        return Options(weights, args.destructive, no_sender=reason)
    return Options(weights, args.destructive, WeightSender())


def _examine(args: argparse.Namespace, progress: Progress) -> None:
    from sglang_er.rollout.conformance import suite
    from sglang_er.rollout.conformance.check import by_id
    from sglang_er.rollout.conformance.session import Session
    from sglang_er.rollout.errors import RolloutError

    check_folder(args.json)
    checks = by_id(suite.CHECKS, [name.strip() for name in args.only.split(",") if name.strip()])

    def tell(outcome: Outcome) -> None:
        progress.note(f"{outcome.check.id} {outcome.status}")

    session = Session(args.url.rstrip("/"), options_of(args))
    try:
        outcomes = suite.run_all(session, checks, tell)
    except KeyboardInterrupt:
        progress.note("bringing the server back to how it was found")
        session.restore()
        raise
    finally:
        session.close()
    print(suite.rows(outcomes))
    if args.json is not None:
        write_json(args.json, suite.as_json(session, outcomes))
    if failed := [outcome.check.id for outcome in outcomes if outcome.status == "failed"]:
        raise RolloutError(f"{', '.join(failed)} failed")
