#!/usr/bin/env python3
"""Compiles the Triton kernels for GPUs that are not here, and shows what each takes: registers, stack, shared memory.

    python scripts/compile_triton.py                 # one of every kernel, for sm_90a
    python scripts/compile_triton.py --all --arch 80 # every specialization

A kernel that does not compile, or that spills at the launch options its module names, ends with exit code 1. Needs no
GPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # a kernel that is interpreted cannot be compiled

OPS = (
    *("quantize_pack", "dequantize", "w4a16_linear", "w4a16_experts"),
    *("kv_shadow_store", "paged_attention"),
    *("softmax_rows", "sample_rows", "draft_sample", "choose_seeded", "verify_chain"),
)


def options_of(module: Any, constexprs: dict[str, Any]) -> dict[str, Any]:
    """Launch options of the module, if they depend on the specialization."""
    choose = getattr(module, "compile_options", None)
    return dict(choose(constexprs)) if choose else {}


def compile_one(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], arch: int, options: Any) -> bytes:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    # As a launch finds them: allocations and rows of real models are aligned to 16.
    names = list(kernel.arg_names)
    attrs = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if name not in constexprs and (kind.startswith("*") or name.endswith("stride") or name in ("N", "K"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    made = compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin: bytes = made.asm["cubin"]
    return cubin


def resources(cubin: bytes) -> str:
    """`REG:.. STACK:.. SHARED:..`, or nothing where no tool tells."""
    import triton

    beside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # Triton brings its own
    tool = str(beside) if beside.exists() else shutil.which("cuobjdump")
    if tool is None:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:\d+ STACK:\d+ SHARED:\d+", shown.stdout)
    return found.group() if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="80, 90, 100")
    parser.add_argument("--all", action="store_true", help="every specialization, not one of each kernel")
    parser.add_argument("--ops", default=",".join(OPS))
    args = parser.parse_args()
    failed = 0
    for op in args.ops.split(","):
        module, seen = importlib.import_module(f"sglang_er.kernels.triton.{op}"), set[str]()
        for kernel, signature, constexprs in module.SPECS:
            if kernel.__name__ in seen and not args.all:
                continue
            if constexprs.get("FORMAT") == "fp8_converted" and args.arch < 89:
                continue  # it has no such conversion, and its launches do not ask for it
            seen.add(kernel.__name__)
            signature = {**signature, **dict.fromkeys(constexprs, "constexpr")}
            try:
                found = resources(compile_one(kernel, signature, constexprs, args.arch, options_of(module, constexprs)))
            except Exception as error:
                found, failed = f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[-1]}", failed + 1
            print(f"{op:16s} {kernel.__name__:20s} {found}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
