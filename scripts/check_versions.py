"""Runs a short list of checks on another SGLang version, in an environment of its own outside of the repository.

.venv/bin/python scripts/check_versions.py 0.5.23 [0.5.15.post1 ...] [-- --page-size 16 ...]

What follows `--` are flags for the server.
Not part of CI: the first run of a version downloads about 3 GB. docs/compatibility.md has what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import version_env

CHECKS = Path(__file__).resolve().parent / "version_checks.py"


def run(version: str, work: Path, flags: list[str]) -> list[dict[str, str]]:
    """One dictionary per check."""
    env = version_env.make(version)
    # Nothing of this checkout's environment: only what is installed beside that SGLang.
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    ran = subprocess.run(
        [str(env / "bin" / "python"), str(CHECKS), str(work), *flags],
        env=clean,
        cwd=work,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return found or [{"check": "checks", "status": "failed", "found": f"ended with exit code {ran.returncode}"}]


def table(version: str, found: list[dict[str, str]]) -> str:
    width = max(len(row["check"]) for row in found)
    lines = [f"{row['check']:<{width}}  {row['status']}  {row['found']}" for row in found]
    return "\n".join([f"SGLang {version}", *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="of SGLang, as on the package index")
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    chosen = parser.parse_args(given[:split]).versions
    failed = False
    for version in chosen:
        work = Path(tempfile.mkdtemp(prefix=f"sglang-er-{version}-"))
        found = run(version, work, given[split + 1 :])
        print(table(version, found), f"log: {work / 'server.log'}", "", sep="\n", flush=True)
        failed |= any(row["status"] == "failed" for row in found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
