"""`sglang-er bench kernels`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""


def run(args: argparse.Namespace) -> int:
    return 0
