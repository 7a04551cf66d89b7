#!/usr/bin/env python3
"""Instructions of the CUDA kernels' main loops, counted in their machine code: what a warp has to issue for a step.

    python scripts/machine_code.py w4a16_linear_bf16 w4a8_linear_bf16      # needs nvcc, no GPU

Of each kernel the shortest loop that has products of the tensor cores and begins copies, else all of the kernel; paths
that are rarely taken are counted as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from sglang_er.kernels.cuda import build
from sglang_er.kernels.cuda.specs import ARCHS, SPECS, spec_of

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_PRODUCT = re.compile(r"\b[HI]MMA\.")
_TARGET = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)")


def disassembler() -> Path | None:
    """cuobjdump of the toolkit, else the one that Triton ships."""
    if found := shutil.which("cuobjdump"):
        return Path(found)
    triton = importlib.util.find_spec("triton")
    folders = [Path(nvcc).resolve().parent for nvcc in filter(None, [build.find_nvcc()])]
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((folder / "cuobjdump" for folder in folders if (folder / "cuobjdump").is_file()), None)


def machine_code(library: Path, tool: Path) -> dict[str, str]:
    """Disassembly by kernel."""
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    done = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True, env=environment)
    _, *parts = re.split(r"^\s*Function : (\S+)$", done.stdout, flags=re.MULTILINE)
    return dict(zip(build.readable(parts[0::2]), parts[1::2]))


def main_loop(code: str) -> list[str]:
    """Names of the instructions."""
    found = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(code)]
    loops = []
    for address, text in found:
        if (target := _TARGET.search(text)) and (first := int(target[1], 16)) < address:
            body = [inside for at, inside in found if first <= at <= address]
            if any(map(_PRODUCT.search, body)) and any("LDGSTS" in inside for inside in body):
                loops.append(body)
    return [_name(text) for text in min(loops, key=len, default=[text for _, text in found])]


def _name(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+ ", "", instruction).split()[0].split(".")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", default=[spec.name for spec in SPECS], metavar="LIBRARY")
    parser.add_argument("--arch", choices=ARCHS, default="90a")
    args = parser.parse_args()
    tool = disassembler()
    if tool is None:
        sys.exit("no cuobjdump here: install the CUDA toolkit")
    for name in args.libraries:
        for kernel, code in machine_code(build.build(spec_of(name), ARCHS[args.arch]), tool).items():
            body = main_loop(code)
            most = ", ".join(f"{count} {name}" for name, count in Counter(body).most_common(8))
            print(f"{kernel:50s} {len(body):5d}   {most}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
