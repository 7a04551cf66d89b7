"""What section `sanitizer` runs under compute-sanitizer: a few kernel cases of one implementation, judged as section
`kernels` does.

    python -m gpu.sanitized OP IMPLEMENTATION --out FILE [--dry-run]

`FILE` gets the values as JSON, `skip` alone where the implementation serves none of the cases. Exit code 0 whatever
they are: another one means that the process broke.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sglang_er import kernels as ops

from . import kernels
from .kernel_cases import Case, cases
from .sections import Skip

# By label, of the cases for a GPU: the smallest with several blocks a row, several splits, rows that several programs
# arrive at, and edges that fill no block. A tool makes a launch up to a hundred times slower.
CHOSEN: dict[str, tuple[str, ...]] = {
    "choose_seeded": ("129x4097 bf16", "3x17 fp32"),
    "dequantize": ("1000x1096 g64", "5x72 g32"),
    "draft_sample": ("129x4097 filters none bf16", "129x4097 filters kpm fp32", "3x17 filters kpm bf16"),
    "kv_shadow_store": ("333x3x96 int4 bf16", "333x3x96 fp8 bf16", "64x2x64 int8 fp32"),
    "paged_attention": (
        "splits bf16",
        "splits bf16 shadow int4",
        "splits bf16 shadow fp8",
        "odd bf16 shadow int4",
        "odd fp32 shadow int8",
    ),
    "quantize_pack": ("1000x1096 g64 bf16", "5x72 g32 fp32"),
    "sample_rows": ("129x4097 chain 0", "33x4097 chain 3"),
    "softmax_rows": ("129x4097 bf16", "3x17 fp32"),
    "verify_chain": ("33x4097 gamma 7", "5x97 gamma 1"),
    "w4a16_experts": ("T=33 176x72 5 experts, 2 each, g64 bf16", "T=33 176x72 5 experts, 2 each, g96 fp32"),
    "w4a16_linear": (
        "M=3 77x200 g32 bf16",
        "M=17 1000x1096 g64 bf16",
        "M=5 77x203 g128 bf16",
        "M=9 1536x1536 g128 bf16 bias bf16",
        "M=9 1536x1536 g128 fp16 bias fp16",
    ),
    "w4a8_linear": (
        "M=17 1000x1096 g64 bf16",
        "M=5 77x203 g128 bf16",
        "M=9 1536x1536 g128 bf16 bias bf16",
        "M=9 1536x1536 g128 fp16 bias fp16",
    ),
}


def chosen(op: str, dry_run: bool) -> list[Case]:
    """Raises KeyError for an op, or a label, that is not there."""
    if dry_run:
        return cases(op, small=True)[:1]
    found = {case.label: case for case in cases(op, small=False)}
    return [found[label] for label in CHOSEN[op]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu.sanitized", description=__doc__, allow_abbrev=False)
    parser.add_argument("op", choices=sorted(CHOSEN))
    parser.add_argument("implementation")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    assert ops.__all__  # importing the package registers the ops
    device = "cpu" if args.dry_run else "cuda"
    try:
        values = kernels.judge(chosen(args.op, args.dry_run), args.implementation, device)
    except Skip as reason:
        values = {"skip": str(reason)}
    args.out.write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
