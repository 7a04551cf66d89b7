"""The GPU check's sections, dry on the CPU against a shared server, so that the script works when a GPU is there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.server import Server

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("kernels", "exact", "release", "bench_kernels", "rollout", "longtail", "sanitizer", "bench_more")
NEED_SERVERS_OF_THEIR_OWN = ("baselines", "timeline", "ingredients")


@pytest.mark.server
def test_dry_run(server: Callable[[str], Server], tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--dry-run", "--url", server("seeded").url]
    environment = {**os.environ, "OUT": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    records = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    by_cell = {(record["section"], record["cell"]): record for record in records}
    for section in MEASURED:
        assert {record["status"] for record in records if record["section"] == section} - {"skipped"} == {"passed"}
    for section in NEED_SERVERS_OF_THEIR_OWN:
        assert all(
            record["values"]["reason"]
            for record in records
            if record["section"] == section and record["cell"] != "train"
        )
    assert by_cell["ingredients", "train"]["status"] == "passed"

    greedy = by_cell["exact", "fp32 greedy"]["values"]
    assert greedy["cycle"]["equal"] == greedy["cycle"]["of"] == 32
    arms = by_cell["rollout", "fp32 B=2 S=48"]["values"]["arms"]
    assert "3" in arms["fixed:3"]["step_ms"] and arms["plain"]["tokens_per_second"][0] > 0
    plain, fixed = (by_cell["longtail", f"7b {arm}"]["values"] for arm in ("plain", "fixed:3"))
    assert plain["tokens"] == fixed["tokens"] == sum(plain["lengths"])
    assert set(plain["steps_by_gamma"]) == {"0"} and set(fixed["steps_by_gamma"]) >= {"3"} and fixed["over_plain"] > 0

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    later = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()][len(records) :]
    assert {record["status"] for record in later} == {"skipped"}  # what was measured is not measured again
