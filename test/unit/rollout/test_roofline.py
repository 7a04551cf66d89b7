"""The what-if formula: near the measured sweep where there is one, rising, and clear about what it does not know."""

from __future__ import annotations

import pytest

from sglang_er.rollout import roofline, speedup, sweep
from sglang_er.rollout.costs import StepTable


def test_the_a100_preset_is_near_the_measured_sweep():
    """Contexts of 512: longer ones were measured on a shared prefix, which the formula does not have."""
    formula, measured = roofline.make("a100", "7b"), sweep.load("a100-qwen2.5-7b")
    for batch in (1, 8, 16, 32, 64):
        assert formula.plain(batch, 512) == pytest.approx(measured.plain(batch, 512), rel=0.16)
        assert formula.draft(batch, 512) == pytest.approx(measured.draft(batch, 512), rel=0.18)
        for gamma in (3, 7, 15):
            assert formula.verify(batch, 512, gamma) == pytest.approx(measured.verify(batch, 512, gamma), rel=0.19)


@pytest.mark.parametrize("preset", roofline.PRESETS)
@pytest.mark.parametrize("model", roofline.MODELS)
def test_costs_rise_and_a_draft_is_cheaper_than_a_step(preset: str, model: str):
    costs = roofline.make(preset, model)
    for batch, context in ((1, 256), (8, 1024), (64, 4096)):
        assert costs.plain(batch, context) < costs.plain(2 * batch, context)
        assert costs.plain(batch, context) < costs.plain(batch, 2 * context)
        assert costs.plain(batch, context) < costs.verify(batch, context, 1) < costs.verify(batch, context, 4)
        assert costs.draft(batch, context) < costs.plain(batch, context)


def test_one_layer_of_arithmetic():
    device = roofline.Device(
        "d", 100.0, 1e6, roofline.Linear(1, 1, 1), roofline.Linear(0.5, 1, 1), 0.5, 2.0, 0.25, 0.125, "none"
    )
    shape = roofline.parse_model("hidden=2,layers=1,query_heads=1,kv_heads=1,head_dim=2,mlp=2,vocab=2")[1]
    costs = roofline.RooflineCosts(device, "m", shape)
    weights = 4 * 2 * 2 + 3 * 2 * 2 + 2 * 2  # qkvo, mlp, output matrix
    kv = 10 * 4 * 2 / (100.0 * 0.5)
    assert costs.plain(1, 10) == pytest.approx(2 * weights / 100 + 2 * weights / 1e6 + kv + 0.25)
    assert costs.verify(1, 10, 1) == pytest.approx(2 * weights / 100 + 4 * weights / 1e6 + kv + 0.25 + 0.125)
    assert costs.draft(1, 10) == pytest.approx(4.125 / 8 * weights / 50 + 2 * weights / 1e6 + kv / 2 + 0.25)


def test_the_rule_of_the_paper_is_told_the_same_machine():
    costs = roofline.make("a100", "7b")
    constants, published = costs.paper_constants(), roofline.published_constants("a100-qwen2.5-7b")
    assert published is not None and roofline.published_constants("mine.csv") is None
    assert constants.target_bytes == pytest.approx(published.target_bytes, rel=0.001)
    assert constants.draft_bytes == pytest.approx(published.draft_bytes, rel=0.001)
    assert constants.dense_flops == pytest.approx(published.dense_flops, rel=0.001)
    assert constants.attention_flops == published.attention_flops
    assert constants.draft_slowdown == pytest.approx(published.draft_slowdown, rel=0.01)
    assert constants.plain(1, 1) == pytest.approx(published.plain(1, 1), rel=0.02)


@pytest.mark.parametrize(
    ("preset", "model", "words"),
    [
        ("b200", "7b", "--preset b200: must be one of a100, h100, h200, cpu"),
        ("h100", "3b", "--model 3b: must be one of 0.5b, 1.5b, 7b, 14b, or hidden="),
        ("h100", "hidden=2", "--model hidden=2: layer sizes are hidden=H"),
        ("h100", "hidden=0,layers=1", "--model hidden=0"),
    ],
)
def test_what_is_not_known_is_one_line(preset: str, model: str, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        roofline.make(preset, model)
    assert "\n" not in str(caught.value)


def test_small_batches_draft_more_and_gain_more():
    table = StepTable(roofline.make("h100", "7b"), 15)
    found = [speedup.best(table, batch, 1024, 0.95) for batch in (1, 16, 64, 512)]
    assert [row.speed_up for row in found] == sorted((row.speed_up for row in found), reverse=True)
    assert [row.gamma for row in found] == sorted((row.gamma for row in found), reverse=True)
    assert found[-1].gamma == 0 and found[-1].speed_up == 1.0
    even = speedup.break_even(table, 1024, 0.95, 512)
    assert speedup.best(table, even, 1024, 0.95).gamma > 0 == speedup.best(table, even + 1, 1024, 0.95).gamma
    assert speedup.break_even(table, 1024, 0.0, 8) == 0


def test_a_gain_is_tokens_over_time():
    table = StepTable(sweep.load("a100-qwen2.5-7b"), 3)
    row = speedup.best(table, 8, 512, 0.9)
    assert row.gamma == 3
    assert row.speed_up == pytest.approx(3.439 * row.plain / (3 * row.draft + row.verify))
