"""The examples against a real server: the loop by OpenAI's client trains it, slime's hooks read its replies.

The loop's trainer computes the logprobs of the sampled tokens again, from the weights that it pushed before. That they
agree with the server's says three things at once: the server has the pushed weights, what it returns are the policy's
logprobs, and the ids are the tokens that were sampled. The control is a trainer that did not follow.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.prompts import mixed_prompts
from support.server import Server
from support.slime_sample import Status, from_reply
from support.updates import other_weights

from sglang_er.rollout.conformance import bodies

pytestmark = pytest.mark.server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# fp32 on both sides; kernels differ, and the order of sums with them
TOLERANCE = 1e-4


def modules(folder: str, *names: str) -> Iterator[list[ModuleType]]:
    """Modules of one example, which find each other as they do when it is run from its folder."""
    sys.path.insert(0, str(EXAMPLES / folder))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(EXAMPLES / folder))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def openai_loop() -> Iterator[list[ModuleType]]:
    yield from modules("openai_loop", "loop", "trainer")


@pytest.fixture
def rollout_hooks() -> Iterator[list[ModuleType]]:
    yield from modules("slime", "rollout_hooks")


@pytest.mark.slow
def test_the_loop_trains_the_server(
    updated_spec: Any,
    openai_loop: list[ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loop, trainer = openai_loop
    spec: Server = updated_spec.server
    own = updated_spec.checkpoints[0]
    # A random model answers nothing right: reward what differs from response to response.
    monkeypatch.setattr(loop, "reward", lambda answer, sample: float(sum(sample.response_ids) % 7))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}+{n}=", "answer": str(2 * n)}) + "\n" for n in range(6)))
    flags = ["--url", spec.url, "--checkpoint", str(own), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    with other_weights(updated_spec):
        spec.cycle()
        before = spec.state()
        rounds = loop.main(
            [*flags, "--rounds", "3", "--batch", "2", "--samples", "3", "--max-tokens", "40", "--lr", "1e-3"]
        )
        after = spec.state()
        follower = trainer.Trainer(own, lr=0.0)
        gaps = [follower.step(samples, [0.0] * len(samples), 1.0) for samples in rounds]
    said = capsys.readouterr().out
    shown = [float(gap) for gap in re.findall(r"server's: ([\d.]+) on average", said)]
    assert len(shown) == 3 and max(shown) < TOLERANCE, said
    assert gaps[0] < TOLERANCE < 1e-2 < min(gaps[1:]), gaps
    assert [samples[0].weight_version for samples in rounds[1:]] == ["1", "2"]
    for sample in (sample for samples in rounds for sample in samples):
        assert len(sample.logprobs) == len(sample.response_ids) <= 40 and sample.prompt_ids
    assert after["twin"]["requantizations"] >= before["twin"]["requantizations"] + 2
    # Accept length of the metrics: tokens by verify passes. Ours counts the first token, which a prefill gave, apart.
    tokens = sum(len(sample.response_ids) for samples in rounds for sample in samples)
    steps = {name: after["steps"][name] - before["steps"][name] for name in ("committed_tokens", "request_steps")}
    assert steps["committed_tokens"] >= tokens - len(rounds) * 6
    lengths = [float(length) for length in re.findall(r"metrics: accept length ([\d.]+)", said)]
    assert len(lengths) == 3
    mean = steps["committed_tokens"] / steps["request_steps"]
    assert min(lengths) - 0.3 < mean < max(lengths) + 0.3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["version_3"]


def test_a_refused_checkpoint_ends_the_loop(updated_spec: Any, openai_loop: list[ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the server refused"), other_weights(updated_spec):
        openai_loop[0].push(updated_spec.server.url, tmp_path / "nothing", 1)
    assert updated_spec.server.alive()


def test_slimes_hooks_on_replies_to_slimes_request(
    spec: Server, rollout_hooks: list[ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is done for the hooks: samples are filled from the replies as from any server."""
    (hooks,) = rollout_hooks
    spec.cycle()
    prompts = mixed_prompts(4, seed=5, longest=40)
    replies = [spec.post("/generate", bodies.slime(prompt, 24)) for prompt in prompts]
    samples = [from_reply(prompt, "", reply) for prompt, reply in zip(prompts, replies, strict=True)]
    for sample, prompt in zip(samples, prompts, strict=True):
        assert len(sample.rollout_log_probs) == sample.response_length == len(sample.tokens) - len(prompt) <= 24
        numbers = re.findall(r"-?\d+(?:\.\d+)?", sample.response.replace(",", ""))
        sample.label = numbers[-1] if numbers else "none"
        right = bool(numbers) and sample.status is Status.COMPLETED
        assert asyncio.run(hooks.reward(None, sample)) == float(right)
    with caplog.at_level("INFO"):
        assert hooks.log_rollout(1, None, samples, {}, 1.5) is False
    steps = sum(reply["meta_info"]["spec_verify_ct"] for reply in replies)
    assert (
        steps and f"accept length {sum(s.response_length for s in samples) / steps:.2f} in {steps} steps" in caplog.text
    )
    assert all(sample.spec_info.spec_accept_token_num for sample in samples), "accepted drafts under the old names"
