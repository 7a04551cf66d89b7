"""`sglang-er make-model`: writes a Hugging Face checkpoint of a chosen shape, without downloads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sglang_er.models.make import ARCHITECTURES, DTYPES, SHAPES, make_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's options."""
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        required=True,
        help="tiny: trained; 0.5b, 1.5b, 7b: the same function at a public model's sizes; flat: random, for tests",
    )
    parser.add_argument("--arch", choices=ARCHITECTURES, default="qwen3", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--target-alpha",
        type=float,
        metavar="A",
        help="acceptance of a W4 draft at temperature 1, big shapes only (default .95: its noise level is stored; for "
        "another value it is searched, which takes minutes)",
    )
    parser.add_argument(
        "--kappa", type=float, metavar="K", help="the noise level itself, 0..16, in place of a target alpha"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights; the trained ones do not change")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; 0, or 2 with one line on stderr where that cannot be done."""
    try:
        card = make_model(args.shape, args.arch, args.out, args.target_alpha, args.dtype, args.seed, args.kappa)
    except (ValueError, OSError) as error:
        print(f"sglang-er make-model: {error}", file=sys.stderr)
        return 2
    kappa = "" if card.kappa is None else f", kappa {card.kappa:.3f}"
    alpha = "" if card.alpha is None else f", alpha {card.alpha:.3f}"
    print(f"{card.arch} {card.shape}: {card.parameters:,} weights{kappa}{alpha}")
    return 0
