"""Compares the running environment with lock files: prints one line per difference, exits 1 if there is one.

Used by scripts/setup_env.sh after an installation, before the result is trusted and cached.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

# A CUDA build of torch pins a triton of its own, which is then the right one (see setup_env.sh).
_TORCH_DECIDES = "triton"


def pins(lock: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in lock.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def differences(wanted: dict[str, str]) -> list[str]:
    torch_brings_triton = any(re.match(r"triton\b", need) for need in metadata.requires("torch") or [])
    found = []
    for name, version in wanted.items():
        if name == _TORCH_DECIDES and torch_brings_triton:
            continue
        try:
            installed = metadata.version(name).split("+")[0]  # torch: 2.13.0+cpu is 2.13.0
        except metadata.PackageNotFoundError:
            installed = "absent"
        if installed != version:
            found.append(f"{name}: locked {version}, installed {installed}")
    return found


def main(locks: list[str]) -> int:
    found = [line for lock in locks for line in differences(pins(Path(lock)))]
    for line in found:
        print(f"check_env: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
