"""Options of the commands that need step costs: a measured sweep, or a machine and a model for the formula, with
published figures or, for a GPU, those of its records."""

from __future__ import annotations

import argparse
from pathlib import Path
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
    source.add_argument(
        "--gpu",
        metavar="NAME",
        help="a100, h100 or h200: by the formula, with constants measured on one where there are",
    )
    parser.add_argument(
        "--gpu-level", metavar="L", help="of --gpu, where nothing was measured: physical, today (default) or target"
    )
    parser.add_argument(
        "--gpu-records", type=Path, metavar="FILE", help="of --gpu: gpu_check.jsonl (default: those of bench/gpu)"
    )
    parser.add_argument(
        "--model",
        metavar="SIZE",
        help=f"of --preset and --gpu: 0.5b, 1.5b, 7b, 14b or layer sizes (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--private-kv", type=float, metavar="NS", help="of --sweep: nanoseconds per token, for all requests but one"
    )
    parser.add_argument(
        "--gamma-max", type=int, metavar="G", help=f"longest draft (default: {GAMMA_MAX} or the sweep's)"
    )


def step_table(args: argparse.Namespace) -> StepTable:
    """Raises ValueError or OSError in one line."""
    from sglang_er.rollout import gpu_roofline, roofline, sweep
    from sglang_er.rollout.costs import Constant, PrivateKv, StepCosts, StepTable

    if sum(choice is not None for choice in (args.sweep, args.preset, args.gpu)) != 1:
        raise ValueError("choose one of --sweep, --preset and --gpu")
    if args.model is not None and args.sweep is not None:
        raise ValueError("--model goes with --preset and --gpu")
    if args.private_kv is not None and args.sweep is None:
        raise ValueError("--private-kv goes with --sweep: the formula has contexts of their own")
    for name in ("gpu_level", "gpu_records"):
        if getattr(args, name) is not None and args.gpu is None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --gpu")
    if args.private_kv is not None and not 0 <= args.private_kv < float("inf"):
        raise ValueError(f"--private-kv must be at least 0, got {args.private_kv:g}")
    costs: StepCosts
    constants: list[Constant] = []
    model = args.model or DEFAULT_MODEL
    if args.sweep is not None:
        costs = sweep.load(args.sweep)
    elif args.preset is not None:
        costs = roofline.make(args.preset, model)
    else:
        level = args.gpu_level or gpu_roofline.DEFAULT_LEVEL
        costs, constants = gpu_roofline.make(args.gpu, model, level, args.gpu_records)
    if args.private_kv:
        costs = PrivateKv(costs, 1e-9 * args.private_kv)
    return StepTable(costs, min(GAMMA_MAX, costs.gamma_max) if args.gamma_max is None else args.gamma_max, constants)
