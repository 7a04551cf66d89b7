"""`sglang-er calibrate`: measures what steps cost on a running server and keeps it for later starts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_er.cli.common import check_folder, exit_code

if TYPE_CHECKING:
    from sglang_er.rollout.progress import Progress

INPUT_TOKENS = 128
MOST_REQUESTS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("--url", required=True, metavar="URL", help="a server that runs, with EFFICIENT_ROLLOUT, idle")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="for `serve --er-cost-file FILE`")
    parser.add_argument("--seconds", type=float, default=45.0, metavar="S", help="at most about (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """0 if the file was written, 1 if the server failed, 2 for a choice that cannot be, 130 on Ctrl-C."""
    from sglang_er.rollout.progress import Progress

    progress = Progress(sys.stderr)
    return exit_code("calibrate", progress, lambda: _calibrate(args, progress))


def _calibrate(args: argparse.Namespace, progress: Progress) -> None:
    from sglang_er.policy import cost_file
    from sglang_er.rollout import calibrate, prompts
    from sglang_er.rollout.client import Client
    from sglang_er.rollout.report import table

    if args.seconds <= 0:
        raise ValueError(f"--seconds must be above 0, got {args.seconds:g}")
    check_folder(args.out)
    requests = prompts.make_requests([1] * MOST_REQUESTS, INPUT_TOKENS, task_text=False, seed=0)
    found = calibrate.calibrate(Client(args.url.rstrip("/")), requests, args.seconds, progress.note)
    cost_file.save(args.out, found.model, found.measured_on)
    print(f"milliseconds of a step, requests of {INPUT_TOKENS} tokens; {', '.join(found.measured_on.values())}")
    print("\n".join(table(found.rows(INPUT_TOKENS))))
    print(f"kept in {args.out}: sglang-er serve --er-cost-file {args.out}")
