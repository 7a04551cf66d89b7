"""`sglang-er bench kernels` under its old name. The names below are for other scripts that time candidates in turns."""

from __future__ import annotations

import argparse
import sys

from sglang_er.bench.timing import Run, Timing, rotate
from sglang_er.cli.main import main

__all__ = ["Run", "interleaved", "machine", "rotate"]


def machine() -> dict[str, object]:
    """What a figure was measured on."""
    import torch

    from sglang_er import kernels
    from sglang_er.rollout import machine as here
    from sglang_er.rollout import provenance

    facts = provenance.machine_facts(here.look(), here.look())
    return {**provenance.provenance(), **facts, "threads": torch.get_num_threads(), "isa": kernels.isa()}


def interleaved(candidates: dict[str, Run], args: argparse.Namespace, calls: int) -> dict[str, float]:
    """Seconds per call; `args` has repeats, clock and statistic."""
    return Timing(args.repeats, calls, args.clock, args.statistic).seconds(candidates)


if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
