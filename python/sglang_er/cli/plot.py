"""`sglang-er plot map | timeline`: where speculation gains, and what happened over a simulated rollout, as pictures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sglang_er.cli import cost_source
from sglang_er.cli.common import check_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of both."""
    parts = parser.add_subparsers(dest="part", metavar="map | timeline", required=True)
    gains = parts.add_parser("map", help="speed-up over batch size and context at an acceptance", allow_abbrev=False)
    cost_source.add_arguments(gains)
    gains.add_argument("--alpha", type=float, required=True, metavar="A", help="acceptance of every draft")
    gains.add_argument("--batches", type=_numbers, metavar="LIST", help="default: 1 to 128, as far as the costs reach")
    gains.add_argument("--contexts", type=_numbers, metavar="LIST", help="default: 256 to 8192")
    line = parts.add_parser("timeline", help="a simulation's first seed over time", allow_abbrev=False)
    line.add_argument("file", type=Path, metavar="JSON", help="what `sglang-er simulate --json` wrote")
    line.add_argument("--policy", metavar="P,...", help="of the file's (default: all)")
    for part in (gains, line):
        part.add_argument("--png", type=Path, required=True, metavar="FILE", help="the picture")


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


_numbers.__name__ = "list of numbers"  # in argparse's errors


def run(args: argparse.Namespace) -> int:
    """0, or 2 with one line on stderr."""
    from sglang_er.rollout import timeline

    try:
        timeline.require_plotting()
        check_folder(args.png)
        _map(args) if args.part == "map" else _timeline(args)
    except (ValueError, OSError) as error:
        print(f"sglang-er plot: {error}", file=sys.stderr)
        return 2
    return 0


def _map(args: argparse.Namespace) -> None:
    from sglang_er.rollout import speedup

    if not 0 <= args.alpha <= 1:
        raise ValueError(f"--alpha must be between 0 and 1, got {args.alpha:g}")
    table = cost_source.step_table(args)
    batches = args.batches or [batch for batch in speedup.BATCHES if batch <= table.costs.batch_max]
    title = f"{table.costs.name}: best speed-up and its draft length at alpha {args.alpha:g}"
    speedup.draw(args.png, table, args.alpha, title, batches, args.contexts or speedup.CONTEXTS)


def _timeline(args: argparse.Namespace) -> None:
    from sglang_er.rollout import timeline
    from sglang_er.rollout.timeline import Row

    try:
        content = json.loads(args.file.read_text(encoding="utf-8"))
        rows = {name: [Row(**row) for row in found["timeline"]] for name, found in content["policies"].items()}
        title = f"{content['costs']['name']}: {content['workload']['lengths']}, {content['workload']['arrivals']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{args.file}: not what `sglang-er simulate --json` writes") from None
    names = args.policy.split(",") if args.policy else list(rows)
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise ValueError(f"--policy {','.join(unknown)}: {args.file} has {', '.join(rows)}")
    timeline.draw(args.png, {name: rows[name] for name in names}, title)
