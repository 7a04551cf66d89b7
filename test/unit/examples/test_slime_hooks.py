"""The hooks of examples/slime on samples that a server with speculation generated (tiny model, 2026-11-26)."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support.slime_sample import Status, from_reply

HOOKS = Path(__file__).resolve().parents[3] / "examples" / "slime" / "rollout_hooks.py"
REPLIES = json.loads((Path(__file__).parent / "replies.json").read_text())


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rollout_hooks", HOOKS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def samples() -> list[SimpleNamespace]:
    """A wrong answer, a right one, and one that was cut off."""
    return [from_reply(entry["prompt_ids"], entry["label"], entry["reply"]) for entry in REPLIES]


def test_only_a_finished_right_answer_is_rewarded(hooks, samples):
    assert [sample.status for sample in samples] == [Status.COMPLETED, Status.COMPLETED, Status.TRUNCATED]
    assert [asyncio.run(hooks.reward(None, sample)) for sample in samples] == [0.0, 1.0, 0.0]
    samples[1].status = Status.ABORTED
    assert asyncio.run(hooks.reward(None, samples[1])) == 0.0


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [("so 1,660", "1660", 1.0), ("x = -2.5", "-2.5", 1.0), ("1660 or 7", "1660", 0.0), ("none", "1", 0.0)],
)
def test_the_last_number_counts(hooks, samples, response, label, expected):
    sample = samples[1]
    sample.response, sample.label = response, label
    assert asyncio.run(hooks.reward(None, sample)) == expected


def test_accept_length_is_over_all_tokens(hooks, samples, caplog):
    with caplog.at_level(logging.INFO):
        assert hooks.log_rollout(3, None, samples, None, 2.0) is False
    tokens = sum(len(entry["reply"]["meta_info"]["output_token_logprobs"]) for entry in REPLIES)
    steps = sum(entry["reply"]["meta_info"]["spec_verify_ct"] for entry in REPLIES)
    assert f"rollout 3: {tokens} tokens in 2.0 s, weights 3, accept length {tokens / steps:.2f} in {steps} steps" in (
        caplog.text
    )


def test_samples_of_a_server_without_speculation(hooks, samples):
    for sample in samples:
        sample.spec_info.spec_verify_ct = 0
    assert hooks.speculation(samples) == "no speculation was counted"
