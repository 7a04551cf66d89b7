"""`sglang-er build-kernels`: compiles the CUDA kernels, into the cache or a folder to ship."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from sglang_er.kernels.cpu.loader import LibraryError
from sglang_er.kernels.cuda import build
from sglang_er.kernels.cuda.specs import ARCHS, SPECS, Arch, arch_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's options."""
    parser.add_argument(
        "--arch",
        type=_archs,
        metavar="A,B",
        help=f"targets, from {', '.join(ARCHS)}; default: this machine's GPU, else all",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"also copy the libraries here; {build.PREBUILT_ENVIRONMENT}=DIR then serves machines without nvcc",
    )
    parser.add_argument(
        "--resources", type=Path, metavar="FILE", help="write registers, spills and shared memory of all kernels (JSON)"
    )


def run(args: argparse.Namespace) -> int:
    """Build; 0, or 1 with one line on stderr where that cannot be done."""
    resources: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    try:
        for arch in args.arch or _default_archs():
            for spec in (spec for spec in SPECS if arch.name in spec.archs):
                library = build.build(spec, arch)
                kernels = build.record(library)["kernels"]
                resources.setdefault(arch.sm, {})[spec.name] = kernels
                if args.out is not None:
                    args.out.mkdir(parents=True, exist_ok=True)
                    library = _copied(library, args.out)
                print(f"{spec.name} {arch.sm}: {len(kernels)} kernels, {library}")
        if args.resources is not None:
            args.resources.write_text(_table(resources), encoding="utf-8")
    except (LibraryError, OSError) as error:
        print(f"sglang-er build-kernels: {error}", file=sys.stderr)
        return 1
    return 0


def _table(resources: dict[str, dict[str, dict[str, dict[str, int]]]]) -> str:
    """JSON with a kernel a line."""
    text = json.dumps(resources, indent=1)
    return (
        re.sub(r'\{\s+("registers[^}]*?)\s+\}', lambda match: f"{{{re.sub(chr(10) + ' +', ' ', match[1])}}}", text)
        + "\n"
    )


def _archs(text: str) -> list[Arch]:
    names = [name.strip().removeprefix("sm_") for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in ARCHS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: choose from {', '.join(ARCHS)}")
    return [ARCHS[name] for name in names]


def _default_archs() -> list[Arch]:
    import torch

    found = arch_of(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    return list(ARCHS.values()) if found is None else [found]


def _copied(library: Path, folder: Path) -> Path:
    # A running server may have the old file mapped: replace it, do not write into it.
    for suffix in (".json", ".so"):
        partial = folder / f"{library.stem}{suffix}.partial"
        shutil.copy2(library.with_suffix(suffix), partial)
        partial.replace(folder / f"{library.stem}{suffix}")
    return folder / library.name
