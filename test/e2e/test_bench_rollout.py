"""`sglang-er bench rollout` against a real server: what it writes agrees with what it asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.server import Server

from sglang_er.cli import main as cli

pytestmark = pytest.mark.server


def bench(server: Server, folder: Path, *words: str) -> dict[str, Any]:
    path = folder / "bench.json"
    assert cli.main(["bench", "rollout", "--url", server.url, "--json", str(path), *words]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_closed_loop_measures_both_arms_and_leaves_the_policy_as_it_was(
    server: Callable[[str], Server], tmp_path: Path
) -> None:
    spec = server("spec")
    spec.cycle()
    before = spec.state()["policy"]
    words = ("--batch", "2", "--requests", "3", "--input", "16", "--output", "24", "--blocks", "4", "--gamma", "3")
    found = bench(spec, tmp_path, *words)
    assert spec.state()["policy"] == before
    assert found["policy"] == {"policy": "fixed", "gamma": 3}
    for arm in ("plain", "speculative"):
        assert [block["tokens"] for block in found["blocks"][arm]] == [3 * 24] * 2
    assert all(set(block["steps_by_gamma"]) == {"0"} for block in found["blocks"]["plain"])
    assert "3" in found["gamma_histogram"]
    assert 1.0 <= found["accept_length"] <= 4.0 and 0.0 < found["alpha"]["measured"] <= 1.0
    assert found["speed_up"]["low"] <= found["speed_up"]["median"] <= found["speed_up"]["high"]
    assert found["model"]["prompts"] == "random token ids" and found["oracle"] is None
    assert found["timeline"]["plain"]


def test_a_length_file_gives_costs_and_an_oracle_that_agree_with_the_clock(
    server: Callable[[str], Server], tmp_path: Path
) -> None:
    lengths = tmp_path / "lengths.json"
    # The shortest still run when the last of the four has come: without steps of all four there is no oracle.
    lengths.write_text(json.dumps({"batches": [[60, 38, 36, 39], [37, 64, 35, 41]]}))
    found = bench(server("spec"), tmp_path, "--lengths", str(lengths), "--input", "16", "--gamma", "2")
    assert [block["tokens"] for block in found["blocks"]["plain"]] == [173, 177]
    assert {size for size, gammas in found["costs"].items() if "0" in gammas} >= {"1", "2", "4"}
    oracle = found["oracle"]
    assert sorted(map(int, oracle["gamma_by_batch_size"])) == [1, 2, 3, 4]
    # A step's cost is its whole period, so the steps must add up to the makespan, but for the prefill and the client.
    assert 0.3 * oracle["plain_seconds"] < oracle["plain_seconds_computed"] < 1.5 * oracle["plain_seconds"]
    assert oracle["oracle_seconds_computed"] <= oracle["plain_seconds_computed"]
