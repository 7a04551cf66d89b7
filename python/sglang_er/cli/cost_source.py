"""Options of the commands that need step costs: a measured sweep, or a machine and a model for the formula."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_er.rollout.costs import StepTable

GAMMA_MAX = 15
DEFAULT_MODEL = "7b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    source = parser.add_argument_group("what a step costs, one of")
    source.add_argument("--sweep", metavar="NAME", help="a100-qwen2.5-7b, a100-llama3.1-8b, or a CSV file")
    source.add_argument("--preset", metavar="NAME", help="a100, h100, h200 or cpu: by a formula from published figures")
    parser.add_argument(
        "--model", metavar="SIZE", help=f"of --preset: 0.5b, 1.5b, 7b, 14b or layer sizes (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--private-kv", type=float, metavar="NS", help="of --sweep: nanoseconds per token, for all requests but one"
    )
    parser.add_argument(
        "--gamma-max", type=int, metavar="G", help=f"longest draft (default: {GAMMA_MAX} or the sweep's)"
    )


def step_table(args: argparse.Namespace) -> StepTable:
    """Raises ValueError or OSError in one line."""
    from sglang_er.rollout import roofline, sweep
    from sglang_er.rollout.costs import PrivateKv, StepCosts, StepTable

    if (args.sweep is None) == (args.preset is None):
        raise ValueError("choose one of --sweep and --preset")
    if args.model is not None and args.preset is None:
        raise ValueError("--model goes with --preset")
    if args.private_kv is not None and args.sweep is None:
        raise ValueError("--private-kv goes with --sweep: a preset has contexts of their own")
    if args.private_kv is not None and not 0 <= args.private_kv < float("inf"):
        raise ValueError(f"--private-kv must be at least 0, got {args.private_kv:g}")
    costs: StepCosts
    costs = sweep.load(args.sweep) if args.sweep else roofline.make(args.preset, args.model or DEFAULT_MODEL)
    if args.private_kv:
        costs = PrivateKv(costs, 1e-9 * args.private_kv)
    return StepTable(costs, min(GAMMA_MAX, costs.gamma_max) if args.gamma_max is None else args.gamma_max)
