"""Section `build`: the CUDA kernels, where this checkout can build them here, and what is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from .records import nvcc
from .sections import Cell, CellError, Context, Options, Section, Skip, shortened

COMMAND, PREBUILT = "build-kernels", "SGLANG_ER_CUDA_KERNELS"


def cells(options: Options) -> Sequence[Cell]:
    return [Cell("versions", versions), Cell("cuda kernels", build), Cell("marlin", marlin)]


def versions(context: Context) -> dict[str, Any]:
    """Which implementations the registry has; the versions of everything else are in every record."""
    from sglang_er import kernels
    from sglang_er.kernels import registry

    assert kernels.__all__  # importing the package registers the ops
    found = {op: [f"{e.name} on {e.device or 'any'}" for e in registry.implementations(op)] for op in registry.ops()}
    device = context.options.device
    served = sum(any(text.endswith(f" on {device}") for text in names) for names in found.values())
    return {"implementations": found, "shown": f"{served} of {len(found)} ops have kernels for {device}"}


def build(context: Context) -> dict[str, Any]:
    from sglang_er.cli.main import COMMANDS

    prebuilt = os.environ.get(PREBUILT)
    if prebuilt:
        return {"prebuilt": True, "shown": f"those of {PREBUILT}"}
    if COMMAND not in COMMANDS:
        raise Skip(f"there is no command `sglang-er {COMMAND}`")
    if context.options.dry_run:
        raise Skip("a dry run builds nothing")
    if nvcc() is None:
        raise Skip("no nvcc here")
    command = [sys.executable, "-m", "sglang_er.cli.main", COMMAND]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CellError(shortened(done.stdout + done.stderr) or f"exit code {done.returncode}")
    return {"output": shortened(done.stdout + done.stderr), "shown": "built"}


def marlin(context: Context) -> dict[str, Any]:
    """SGLang's own compilation of its kernel, which takes minutes: before a cell that has seconds asks for it."""
    if context.options.dry_run:
        raise Skip("a dry run builds nothing")
    if nvcc() is None:
        raise Skip("no nvcc here")
    make = "import torch; from sglang_er.kernels.marlin.loader import module; "
    make += "module(torch.bfloat16), module(torch.float16)"
    done = subprocess.run([sys.executable, "-c", make], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CellError(shortened(done.stdout + done.stderr) or f"exit code {done.returncode}")
    return {"shown": "built"}


SECTION = Section("build", cells)
