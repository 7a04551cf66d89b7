#!/usr/bin/env python3
"""Compiles the Triton kernels for GPUs that are not here, and shows what each takes: registers, stack, shared memory.

    python scripts/compile_triton.py                 # one of every kernel, for sm_90a
    python scripts/compile_triton.py --all --arch 80 # every specialization

A kernel that does not compile, or asks for more shared memory than a block has there at the launch options its module
names, ends with exit code 1. Needs no GPU.
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
    *("quantize_pack", "dequantize", "w4a16_linear", "w4a8_linear", "w4a16_experts"),
    *("kv_shadow_store", "paged_attention"),
    *("softmax_rows", "sample_rows", "draft_sample", "choose_seeded", "verify_chain"),
)

# KiB of shared memory that a block may have.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


def options_of(module: Any, signature: dict[str, str], constexprs: dict[str, Any], arch: int) -> dict[str, Any]:
    """Launch options: of the module, if they depend on the specialization."""
    choose = getattr(module, "compile_options", None)
    return {"enable_fp_fusion": True} | (choose(signature, constexprs, SHARED[arch] << 10) if choose else {})


def compile_one(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], arch: int, options: Any
) -> tuple[bytes, int]:
    """The machine code, and the bytes of shared memory that a launch asks for."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    # As a launch finds them: allocations and rows of real models are aligned to 16.
    attrs = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in kernel.params
        if (name := parameter.name) not in constexprs
        and (signature[name].startswith("*") or name.endswith("stride") or name in ("N", "K"))
        and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    made = compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=options)
    return made.asm["cubin"], made.metadata.shared


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
    parser.add_argument("--arch", type=int, default=90, choices=SHARED)
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
                options = options_of(module, signature, constexprs, args.arch)
                cubin, shared = compile_one(kernel, signature, constexprs, args.arch, options)
                if shared > SHARED[args.arch] << 10:
                    raise MemoryError(f"{shared} bytes of shared memory, {SHARED[args.arch] << 10} at most")
                found = f"{resources(cubin)} DYNAMIC:{shared}"
            except Exception as error:
                found, failed = f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[-1]}", failed + 1
            print(f"{op:16s} {kernel.__name__:20s} {found}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
