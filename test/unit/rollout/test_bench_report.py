"""The table and the JSON of a run say the same, and say what was measured."""

from __future__ import annotations

import json

import pytest

from sglang_er.rollout import bench, bench_report
from sglang_er.rollout.bench import Settings
from sglang_er.rollout.prompts import Request

ABOUT = {
    "command": "sglang-er bench rollout",
    "version": "1",
    "commit": None,
    "date": "today",
    "machine": {"cpu": "a CPU", "cores": 2, "load_before": [0.1, 0.2, 0.3], "load_after": [9.0, 0.2, 0.3]},
    "model": {"name": "qwen3 tiny", "alpha_stated": 0.95, "prompts": "task text"},
}


@pytest.fixture
def result(counting_server) -> bench.Result:
    batch = [Request((5, 6), 12), Request((7, 8), 30)]
    chosen = Settings([batch], 2, 4, 1.0, {"policy": "fixed", "gamma": 2}, probe=True, sample_seconds=0.01)
    return bench.measure_rollouts(counting_server, chosen, lambda *_: None, lambda: 0.0)


def test_json_holds_every_figure_and_survives_a_round_trip(result):
    found = json.loads(json.dumps(bench_report.to_json(result, ABOUT)))
    assert found["workload"]["output_tokens"] == {"shortest": 12, "median": 21, "longest": 30}
    assert found["pairs"] == 2 and len(found["blocks"]["plain"]) == len(found["blocks"]["speculative"]) == 2
    assert found["speed_up"]["low"] <= found["speed_up"]["median"] <= found["speed_up"]["high"]
    assert found["alpha"]["measured"] == 1.0 and found["accept_length"] == 3.0
    assert found["gamma_histogram"] == {"2": 28}
    assert found["oracle"]["gamma_by_batch_size"] == {"1": 3, "2": 3}
    assert found["costs"]["2"]["0"]["steps"] > 0
    assert found["timeline"]["columns"] == ["seconds", "active", "gamma", "tokens_per_second"]
    assert found["cpu_speed_up"] is None


def test_the_table_names_model_machine_policy_and_command(result):
    said = bench_report.text(result, ABOUT)
    for part in (
        "qwen3 tiny",
        "0.950",
        "measured 1.000",
        "a CPU",
        "after 9.0",
        "gamma 2 always",
        "12 to 30",
        "unknown",
    ):
        assert part in said
    assert "of the oracle's" in said and "3 from 1" in said
    assert "4 blocks are few" in said


def test_the_pair_that_is_drawn_has_the_median_speed_up(result):
    quotients = result.comparison.speed_ups
    assert quotients[bench_report.typical_pair(result)] == min(quotients)
