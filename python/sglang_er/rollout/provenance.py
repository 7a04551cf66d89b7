"""Where a measurement comes from, so that it can be judged and repeated: versions, command, date, machine."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sglang_er import __version__
from sglang_er.rollout.machine import Machine

# Settings from outside that change speed.
_VARIABLES = ("SGLANG_ER_", "OMP_", "GOMP_", "KMP_", "MKL_", "GLIBC_TUNABLES", "LD_PRELOAD")
# These hold a path of the machine, or repeat what others say.
_LEFT_OUT = ("SGLANG_ER_CONFIG", "SGLANG_ER_SET_BY")


def provenance(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """As JSON takes it. `argv`: the command's words behind `sglang-er`; by default what this process was called with,
    which may be a script of the repository."""
    return {
        "command": shlex.join([_program(), *sys.argv[1:]] if argv is None else ["sglang-er", *argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "commit": commit(),
        "packages": {"python": platform.python_version(), **{name: _version(name) for name in ("torch", "sglang")}},
        "environment": speed_variables(os.environ),
    }


def _program() -> str:
    script = Path(sys.argv[0])
    return f"scripts/{script.name}" if script.parent.name == "scripts" and script.suffix == ".py" else "sglang-er"


def speed_variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in sorted(environ.items()) if name.startswith(_VARIABLES) and name not in _LEFT_OUT
    }


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The checkout's commit, with `-dirty` where tracked files were changed; None outside of a checkout."""
    # A wheel that lies inside somebody else's repository must not name that one's commit.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine_facts(before: Machine, after: Machine) -> dict[str, Any]:
    return {
        "cpu": before.cpu,
        "cores": before.cores,
        "load_before": [round(value, 2) for value in before.load],
        "load_after": [round(value, 2) for value in after.load],
    }
