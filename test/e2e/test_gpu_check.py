"""The GPU check's steps, dry on the CPU against a shared server, so that the script works when a GPU is there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.server import Server

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.server
def test_dry_run(server: Callable[[str], Server], tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--dry-run", "--url", server("seeded").url]
    run = subprocess.run(command, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert result["passed"] and result["greedy"]["cycle"]["equal"] == 32
