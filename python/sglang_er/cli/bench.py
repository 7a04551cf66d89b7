"""`sglang-er bench rollout | policies | kernels`: measurements that can be repeated, as a table and as JSON."""

from __future__ import annotations

import argparse
import importlib

PARTS = {
    "rollout": "plain decode and speculation in alternating blocks of one server",
    "policies": "draft-length policies against plain decode and each other, in turns on one server",
    "kernels": "the compiled kernels against the memory's bandwidth and PyTorch's own",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of every part."""
    parts = parser.add_subparsers(dest="part", metavar="rollout | policies | kernels", required=True)
    for name, summary in PARTS.items():
        part = parts.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        _module(name).add_arguments(part)


def run(args: argparse.Namespace) -> int:
    """The exit code of the part that was asked for."""
    return int(_module(args.part).run(args))


def _module(name: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"sglang_er.cli.bench_{name}")
