"""Checks the rules of the house that no linter knows; prints one line per violation, exits 1 if there is one.

- Arrows point one way: cli -> plugin, bench -> rollout, engine -> twin, policy, sampling, models -> kernels.
- policy/ imports neither torch nor sglang; only engine/ and plugin.py import sglang.srt, which is private API.
- No tracked file names a path of one machine; the tracked tree stays small.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "sglang_er"
# A room may import from a lower one, itself, and the leaves.
RANKS = {
    "cli": 4,
    "plugin": 3,
    "bench": 3,
    "rollout": 2,
    "engine": 2,
    "integrations": 2,
    "twin": 1,
    "policy": 1,
    "sampling": 1,
    "models": 1,
    "kernels": 0,
}
LEAVES = {"", "config", "config_messages", "config_sync", "compat"}
MAY_IMPORT_SRT = {"engine", "plugin"}
MAX_TREE_BYTES = 10 * 2**20
MAX_FILE_BYTES = 8_000_000
MACHINE_PATH = re.compile(r"(?<![\w.~$})>-])/(?:home|root|Users|work|workspace|scratch|mnt)/\w")


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else (is_package - node.level)]
                base = ".".join([*parents, base] if base else parents)
            # `from package import name` may name a module
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def import_violations(source_root: Path) -> Iterator[str]:
    for path in sorted((source_root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source_root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = parts[:-1] if is_package else parts
        room = module[1] if len(module) > 1 else ""
        if room not in RANKS and room not in LEAVES:
            yield f"{path}: room {room!r} is not in the plan of the house (RANKS in scripts/check_house.py)"
            continue
        for line, name in imports(path.read_text(encoding="utf-8"), ".".join(module), is_package):
            top, *rest = name.split(".")
            if room == "policy" and top in ("torch", "sglang"):
                yield f"{path}:{line}: policy/ is pure Python, it cannot import {top}"
            if top == "sglang" and rest[:1] == ["srt"] and room not in MAY_IMPORT_SRT:
                yield f"{path}:{line}: only engine/ and plugin.py may import sglang.srt"
            if top == PACKAGE:
                target = rest[0] if rest and (rest[0] in RANKS or rest[0] in LEAVES) else ""
                if target != room and target not in LEAVES and RANKS.get(room, -1) <= RANKS[target]:
                    yield f"{path}:{line}: {room or PACKAGE} may not import {target}: arrows point the other way"


def tracked_files(root: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    return [path for name in listed.split("\0") if name and (path := root / name).is_file()]


def file_violations(files: list[Path]) -> Iterator[str]:
    total = 0
    for path in files:
        content = path.read_bytes()
        total += len(content)
        if len(content) > MAX_FILE_BYTES:
            yield f"{path}: {len(content)} bytes, more than {MAX_FILE_BYTES}"
        if b"\0" in content[:8192]:
            continue  # binary
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                yield f"{path}:{number}: names a path of one machine: {line.strip()[:100]}"
    if total > MAX_TREE_BYTES:
        yield f"the tracked files are {total} bytes together, more than {MAX_TREE_BYTES}"


def violations(root: Path) -> list[str]:
    found = [*import_violations(root / "python"), *file_violations(tracked_files(root))]
    return [message.replace(f"{root}/", "") for message in found]


if __name__ == "__main__":
    found = violations(Path(__file__).resolve().parent.parent)
    for message in found:
        print(f"house: {message}", file=sys.stderr)
    sys.exit(1 if found else 0)
