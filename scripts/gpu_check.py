"""GPU check: what has to be seen on a GPU, in sections ordered by value. Every cell is recorded as soon as it is
measured, one JSON object a line, and a later run of the same commit on the same device goes on from there.

Exit code 0 if all cells of the chosen sections were measured and are right, those apart that say why they cannot be.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "test"))

# In the order of value.
NAMES = (
    *("build", "kernels", "exact", "release", "bench_kernels", "rollout", "longtail", "timeline", "baselines"),
    *("ingredients", "sanitizer", "bench_more"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu_check.jsonl and of servers' logs")
    parser.add_argument("--sections", default=",".join(NAMES), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="N", help="begin no cell after that")
    parser.add_argument(
        "--resume", type=Path, action="append", default=[], metavar="FILE", help="records to go on from"
    )
    parser.add_argument("--commit", metavar="TEXT", help="what is checked, where the checkout has no history")
    parser.add_argument("--dry-run", action="store_true", help="small and on the CPU, to test this script")
    parser.add_argument("--url", help="use this running server (deterministic inference) instead of starting any")
    parser.add_argument("--cuda-graph", action="store_true", help="CUDA graphs in section exact as well")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs anywhere")
    args = parser.parse_args(argv)
    args.sections = [name.strip() for name in args.sections.split(",") if name.strip()]
    if unknown := [name for name in args.sections if name not in NAMES]:
        parser.error(f"--sections {','.join(unknown)}: choose from {', '.join(NAMES)}")
    if missing := [str(file) for file in args.resume if not file.is_file()]:
        parser.error(f"--resume {missing[0]}: no such file")
    return args


def write_table(records: Path, device: str) -> str:
    """`kernel_table.json` beside the records, for --er-kernel-table and for the package; what to say of it."""
    from sglang_er.bench import kernel_table
    from sglang_er.rollout import gpu_records

    path = records.with_name("kernel_table.json")
    try:
        table = kernel_table.make(gpu_records.read([records]), device)
    except gpu_records.RecordsError as reason:
        return f"no kernel table: {reason}"
    path.write_text(table.to_text(), encoding="utf-8")
    return "\n".join([f"\nkernel table {path}", *kernel_table.summary(table)])


def main() -> int:
    args = parse()
    if args.dry_run:
        # Before anybody imports triton: its kernels then run on CPU tensors. Servers start without it.
        os.environ["TRITON_INTERPRET"] = "1"
    from gpu import (
        baselines,
        bench_kernels,
        build,
        exact,
        ingredients,
        kernels,
        longtail,
        records,
        release,
        rollouts,
        sanitizer,
        sections,
        timeline,
    )
    from gpu.servers import Servers
    from gpu.worker import Worker

    modules = (
        *(build, kernels, exact, release, bench_kernels, rollouts, longtail, timeline, baselines, ingredients),
        sanitizer,
    )
    every = (*(module.SECTION for module in modules), bench_kernels.MORE)
    by_name = {section.name: section for section in every}
    identity = records.identity(args.dry_run, args.commit)
    if not args.dry_run and identity.device == "cpu":
        print("no GPU here: use --dry-run to test the script itself", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    journal = records.Journal(args.out / "gpu_check.jsonl", identity, args.resume)
    options = sections.Options(args.out, args.dry_run, args.url, args.cuda_graph, args.eager)
    servers, worker = Servers(options), Worker(options)
    context = sections.Context(options, servers, journal.find)
    chosen = [by_name[name] for name in NAMES if name in args.sections]
    try:
        tallies = sections.run(chosen, journal, context, worker, args.seconds)
    finally:
        worker.stop()
        servers.stop()
    if {bench_kernels.SECTION, bench_kernels.MORE} & set(chosen) and not args.dry_run:
        print(write_table(journal.path, identity.device))
    passed = all(tally.passed for tally in tallies)
    print(f"\n{identity.device}, commit {identity.commit}\n{sections.table(tallies)}")
    print(f"{'passed' if passed else 'NOT PASSED'}: {journal.path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
