"""`sglang-er bench kernels`: the compiled kernels against the memory's bandwidth and PyTorch's own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_er.cli.common import check_folder, write_json

if TYPE_CHECKING:
    from sglang_er.bench.kernels import Plan

MODELS = "0.5b,1.5b"


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def _words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _shape(text: str) -> tuple[int, int]:
    rows, cols = _numbers(text.lower().replace("x", ","))
    return rows, cols


_numbers.__name__, _words.__name__, _shape.__name__ = "list of numbers", "list", "NxK"  # in argparse's errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="default: %(default)s")
    parser.add_argument("--models", type=_words, default=MODELS, metavar="LIST", help=f"layer sizes ({MODELS})")
    parser.add_argument("--arch", default="qwen3", help="of --models (default: %(default)s)")
    parser.add_argument(
        "--shape", type=_shape, action="append", metavar="NxK", help="layers in their place; repeatable"
    )
    parser.add_argument("--batches", type=_numbers, default="1,8,32", metavar="LIST", help="M (default: %(default)s)")
    parser.add_argument("--contexts", type=_numbers, default="1024,8192", metavar="LIST", help="default: %(default)s")
    parser.add_argument("--queries", type=_numbers, default="1,4", metavar="LIST", help="new tokens (%(default)s)")
    parser.add_argument("--parts", type=_words, metavar="LIST", help="linear, quantize_pack, attention, overhead (all)")
    parser.add_argument("--isas", type=_words, metavar="LIST", help="instruction sets (default: the active one)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as `sglang-er serve`")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time of one thread")
    parser.add_argument("--statistic", choices=["median", "fastest"], default="median", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="turns (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=16, metavar="N", help="most calls a turn (default: %(default)s)")
    parser.add_argument("--footprint", type=int, default=600, metavar="MiB", help="that a candidate rotates over (600)")
    parser.add_argument("--kv-footprint", type=int, default=1200, metavar="MiB", help="of bf16 KV pool (1200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")


def run(args: argparse.Namespace) -> int:
    """0 if it was measured, 2 for a choice that cannot be."""
    from sglang_er.engine import host

    host.spin_briefly()  # before torch is imported
    try:
        _measure(args)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print(f"sglang-er bench kernels: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def plan_of(args: argparse.Namespace) -> Plan:
    """Raises ValueError for a choice that cannot be."""
    from sglang_er import kernels
    from sglang_er.bench.kernels import PARTS, Plan
    from sglang_er.bench.linear import Layer
    from sglang_er.bench.timing import Timing
    from sglang_er.models.sizes import public_size

    for name in ("repeats", "calls", "footprint", "kv_footprint", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.clock == "cpu" and args.threads != 1:
        raise ValueError("--clock cpu counts one thread: add --threads 1")
    parts = args.parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts {unknown[0]}: choose among {', '.join(PARTS)}")
    isas, supported = args.isas or [kernels.isa()], kernels.supported_isas()
    if unknown := [isa for isa in isas if isa not in supported]:
        raise ValueError(f"--isas {unknown[0]}: this machine has {', '.join(supported)}")
    return Plan(
        models={name: public_size(args.arch, name).shape for name in args.models},
        layers=[Layer(f"layer {index + 1}", *shape) for index, shape in enumerate(args.shape or [])],
        batches=args.batches,
        contexts=args.contexts,
        queries=args.queries,
        isas=isas,
        parts=parts,
        timing=Timing(args.repeats, args.calls, args.clock, args.statistic),
        footprint=args.footprint << 20,
        kv_footprint=args.kv_footprint << 20,
    )


def _measure(args: argparse.Namespace) -> None:
    import torch

    from sglang_er import kernels
    from sglang_er.bench import kernels as bench
    from sglang_er.bench import kernels_report
    from sglang_er.rollout import cores, machine, provenance
    from sglang_er.rollout.progress import Progress

    check_folder(args.json)
    plan = plan_of(args)
    torch.set_num_threads(args.threads or cores.default_threads())
    kernels.set_isa(plan.isas[0])  # of what runs on one instruction set only
    before, progress = machine.look(), Progress(sys.stderr)
    results = bench.measure(plan, progress.note)
    about = {
        **provenance.provenance(),
        "machine": provenance.machine_facts(before, machine.look()),
        "threads": torch.get_num_threads(),
        "isas": list(plan.isas),
        "timing": vars(plan.timing) | {"footprint": plan.footprint, "kv_footprint": plan.kv_footprint},
    }
    print(kernels_report.text(results, about))
    if args.json is not None:
        write_json(args.json, kernels_report.to_json(results, about))
