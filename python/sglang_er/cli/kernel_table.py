"""`sglang-er kernel-table`: from what scripts/gpu_check.sh measured, which kernel computes at which sizes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sglang_er.cli.common import check_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's options."""
    parser.add_argument(
        "records", type=Path, nargs="+", metavar="RECORDS", help="gpu_check.jsonl, with section bench_kernels"
    )
    parser.add_argument("--device", metavar="NAME", help="whose table, where the records have several devices")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: kernel_table.json, beside the first file of records"
    )


def run(args: argparse.Namespace) -> int:
    """Write the table; 0, or 2 with one line on stderr where there is none to be made."""
    from sglang_er.bench import kernel_table
    from sglang_er.kernels.source_key import source_key
    from sglang_er.kernels.table_files import file_name
    from sglang_er.rollout import gpu_records

    out = args.out or args.records[0].with_name("kernel_table.json")
    try:
        check_folder(out)
        table = kernel_table.make(gpu_records.read(args.records), args.device)
        out.write_text(table.to_text(), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"sglang-er kernel-table: {error}", file=sys.stderr)
        return 2
    print(f"{table.device}, commit {table.commit}, {table.date}", *kernel_table.summary(table), sep="\n")
    if table.kernels != source_key():
        print("These are times of other versions of the kernels: with this checkout the table is not used.")
    print(f"{out}: use it with --er-kernel-table, or ship it as kernels/tables/{file_name(table.device)}")
    return 0
