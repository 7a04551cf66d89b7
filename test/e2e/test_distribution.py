"""The distribution of every token that the real server commits.

Hypothesis: each token is a draw from the target's conditional distribution given the prompt and the tokens before
it, whatever the draft length of its step was.
Method: random prompts to a flat random model, draft length changing every step; transformers computes the exact
conditional of every token; its randomized probability integral transform is then uniform and independent. The
vocabulary is ranked once by the target's probability and once by twin over target: the second is the order in which
a mistake in acceptance or in the residual pushes all tokens the same way. Kolmogorov-Smirnov over all tokens, by
offset in the step (never by accepted or resampled: that choice depends on the token), by position mod 8, and for the
first 16 positions; all judged together at a family-wise 1e-4.
If broken: groups are rejected, above all "by twin/target"; the three broken verifiers show what that looks like.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.equality import whole_passes
from support.exact_model import ExactModel, sglang_probs
from support.mutants import BROKEN
from support.provenance import SOURCES, assert_aligned, provenance, sources_of
from support.server import Server
from support.uniformity import Family, pit, uniform_p_value

pytestmark = [pytest.mark.server, pytest.mark.slow]

PLAIN_T1 = {"temperature": 1.0}
FILTERED = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.05}
CYCLE = (0, 3, 1, 7, 5, 2)
MUTANT_CYCLE = (1, 2, 3)
LOGIT_SCALE = 2.0
TOKENS = 128
CONCURRENCY = 64
SETTINGS = {"T=1": (PLAIN_T1, 102_400), "filtered": (FILTERED, 102_400)}
SETTINGS_FULL = {"T=1": (PLAIN_T1, 204_800), "filtered": (FILTERED, 204_800)}
MUTANT_TOKENS = 20_480
# About half of the drafts of the flat model end early.
STOP_TOKENS, STOP_CONFIDENCE = 40_960, 0.12
# fp32 logits of two implementations differ by about 1e-6: a token next to a filter's boundary may fall on either side.
SLACK = 1e-4
ORDERS = ("by target", "by twin/target")


@dataclass(frozen=True)
class Sample:
    """Prompts, what was generated, and for every generated token its offset in its step (-1: made by the prefill).

    alpha: how often the first draft of a step was accepted.
    """

    prompts: list[list[int]]
    outputs: list[list[int]]
    offsets: list[list[int]]
    drafted: int
    alpha: float


@pytest.fixture(scope="module")
def checkpoint(flat_model: Callable[[str, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flat model with its logits doubled: at T=1 the twin of the plain one has alpha .91, of this one below .9."""
    path = tmp_path_factory.mktemp("distribution") / "model"
    shutil.copytree(flat_model("qwen3", 0), path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] *= LOGIT_SCALE
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> tuple[ExactModel, ExactModel]:
    return ExactModel(checkpoint), ExactModel(checkpoint, twin=True)


@pytest.fixture(scope="module")
def traced(updated_spec: Any, checkpoint: Path) -> Iterator[Server]:
    """The shared `spec` server on this file's weights; leaves it unbroken and on the seed-0 weights.

    `updated_spec` goes first because it measures the server before anybody else changes it.
    """
    server: Server = updated_spec.server
    server.post("/update_weights_from_disk", {"model_path": str(checkpoint)})
    yield server
    server.set_policy(mutant=None, stop=None, trace=False)
    server.post("/update_weights_from_disk", {"model_path": str(updated_spec.checkpoints[0])})


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The reference shares two cores with the server: its threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_prompts(count: int, seed: int, vocabulary: int) -> list[list[int]]:
    """Token ids, 8 to 39 of them: lengths that are no multiple of anything."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 40, (count,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def step_offsets(steps: Sequence[tuple[int, int]], tokens: int) -> list[int]:
    """Offset in its step of each generated token; the first one comes from the prefill."""
    offsets = [-1, *(offset for _, accepted in steps for offset in range(accepted))]
    assert len(offsets) >= tokens, (len(offsets), tokens)
    return offsets[:tokens]


def generate(
    traced: Server,
    sampling: dict[str, Any],
    tokens: int,
    seed: int,
    mutant: str | None = None,
    stop: float | None = None,
) -> Sample:
    schedule = CYCLE if mutant is None else MUTANT_CYCLE
    traced.set_policy(policy="cycle", gamma_schedule=list(schedule), mutant=mutant, stop=stop, trace=True)
    drafted_before = traced.state()["steps"]["drafted_tokens"]
    prompts = random_prompts(tokens // TOKENS, seed, vocabulary=320)
    ids = [uuid.uuid4().hex for _ in prompts]
    params = {**sampling, "max_new_tokens": TOKENS, "ignore_eos": True}
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        replies = list(pool.map(lambda prompt, rid: traced.generate(prompt, params, rid=rid), prompts, ids))
    state = traced.state()
    outputs = [reply["output_ids"] for reply in replies]
    assert all(len(output) == TOKENS for output in outputs)
    steps = [state["trace"][rid] for rid in ids]
    if state["config"]["values"]["provenance"] == "all":
        for reply, request in zip(replies, steps, strict=True):
            assert_aligned(reply)
            assert reply["meta_info"][SOURCES] == sources_of(request, TOKENS)
    first = [accepted > 1 for request in steps for gamma, accepted in request if gamma]
    return Sample(
        prompts,
        outputs,
        [step_offsets(request, TOKENS) for request in steps],
        drafted=state["steps"]["drafted_tokens"] - drafted_before,
        alpha=sum(first) / len(first),
    )


def transforms(
    sample: Sample, models: tuple[ExactModel, ExactModel], sampling: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Integral transforms [requests, TOKENS] of every token, one per ranking of the vocabulary."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, list[torch.Tensor]] = {order: [] for order in ORDERS}
    exact, twin = (model.logits(sample.prompts, sample.outputs) for model in models)
    for output, target_logits, twin_logits in zip(sample.outputs, exact, twin, strict=True):
        tokens = torch.tensor(output)
        p, q = sglang_probs(target_logits, sampling), sglang_probs(twin_logits, sampling)
        coins = torch.rand(len(tokens), dtype=torch.float64, generator=generator)
        assert_inside_filters(torch.softmax(target_logits / sampling["temperature"], dim=-1), tokens, sampling)
        for order, key in zip(ORDERS, (p, q / p.clamp(min=1e-30)), strict=True):
            found[order].append(pit(p, tokens, coins, key))
    return {order: torch.stack(rows) for order, rows in found.items()}


def assert_inside_filters(probs: torch.Tensor, tokens: torch.Tensor, sampling: dict[str, Any]) -> None:
    """No token that the filters exclude, up to the rounding of two implementations of the model."""
    own = probs.gather(1, tokens[:, None])
    ahead = probs > own * (1 + SLACK)
    assert (ahead.sum(dim=1) < sampling.get("top_k", probs.shape[1])).all()
    assert ((probs * ahead).sum(dim=1) <= sampling.get("top_p", 1.0) + SLACK).all()
    assert (own >= probs.amax(dim=1, keepdim=True) * sampling.get("min_p", 0.0) * (1 - SLACK)).all()


def judge(sample: Sample, values: dict[str, torch.Tensor]) -> Family:
    """The p-value of every group of tokens under both rankings."""
    family = Family()
    offsets = torch.tensor(sample.offsets)
    positions = torch.arange(offsets.shape[1]).expand_as(offsets)
    groups = {"all": torch.ones_like(offsets, dtype=torch.bool)}
    groups |= {f"offset {o}": offsets == o for o in range(int(offsets.max()) + 1)}
    groups |= {f"position mod 8 = {r}": positions % 8 == r for r in range(8)}
    groups |= {f"position {t}": positions == t for t in range(16)}
    for order, transformed in values.items():
        for name, members in groups.items():
            if members.any():
                family.add(f"{name}, {order}", uniform_p_value(transformed[members]))
    return family


def check_speculated(sample: Sample) -> None:
    """Drafting happened, and often enough failed: a test of exactness says nothing where all drafts are accepted."""
    assert sample.drafted > len(sample.outputs) * TOKENS / 3
    assert 0.2 < sample.alpha < 0.9


def report(name: str, sample: Sample, family: Family) -> None:
    tokens = len(sample.outputs) * TOKENS
    print(f"{name}: {tokens} tokens, {sample.drafted} drafted, alpha {sample.alpha:.3f}; {family.smallest()}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_token_is_drawn_from_the_target(
    traced: Server, models: tuple[ExactModel, ExactModel], setting: str, pytestconfig: pytest.Config
):
    sampling, tokens = (SETTINGS_FULL if pytestconfig.getoption("--full") else SETTINGS)[setting]
    sample = generate(traced, sampling, tokens, seed=11)
    check_speculated(sample)
    family = judge(sample, transforms(sample, models, sampling))
    report(setting, sample, family)
    assert not family.rejected()


def test_drafts_that_stop_early_change_nothing(traced: Server, models: tuple[ExactModel, ExactModel]):
    """A stop that follows the twin's confidence is no choice among tokens; `stop_by_token` below is one."""
    sample = generate(traced, PLAIN_T1, STOP_TOKENS, seed=13, stop=STOP_CONFIDENCE)
    check_speculated(sample)
    family = judge(sample, transforms(sample, models, PLAIN_T1))
    report("early stop", sample, family)
    assert not family.rejected()


@pytest.mark.parametrize("setting", ["T=1", pytest.param("filtered", marks=pytest.mark.full)])
def test_whole_passes_change_no_distribution(
    traced: Server, models: tuple[ExactModel, ExactModel], setting: str, pytestconfig: pytest.Config
):
    """Drafts from the function that GPUs record; what it hands to verification must be what it drew from."""
    sampling, tokens = SETTINGS[setting]
    with whole_passes(traced):
        sample = generate(traced, sampling, tokens if pytestconfig.getoption("--full") else MUTANT_TOKENS, seed=15)
    check_speculated(sample)
    family = judge(sample, transforms(sample, models, sampling))
    report(f"whole passes, {setting}", sample, family)
    assert not family.rejected()


@pytest.mark.parametrize("setting", SETTINGS)
def test_provenance_changes_no_distribution(
    traced: Server, models: tuple[ExactModel, ExactModel], setting: str, pytestconfig: pytest.Config
):
    """Every request says where its tokens came from, and the trace says the same."""
    sampling, tokens = SETTINGS[setting]
    with provenance(traced):
        sample = generate(traced, sampling, tokens if pytestconfig.getoption("--full") else MUTANT_TOKENS, seed=14)
    check_speculated(sample)
    family = judge(sample, transforms(sample, models, sampling))
    report(f"provenance, {setting}", sample, family)
    assert not family.rejected()


def test_a_biased_draft_is_corrected(traced: Server, models: tuple[ExactModel, ExactModel]):
    """Any q is corrected as long as it is the one reported: only the acceptance falls."""
    sample = generate(traced, PLAIN_T1, MUTANT_TOKENS, seed=12, mutant="biased_draft")
    check_speculated(sample)
    family = judge(sample, transforms(sample, models, PLAIN_T1))
    report("biased_draft", sample, family)
    assert not family.rejected()


@pytest.mark.parametrize("mutant", BROKEN)
def test_a_broken_verifier_is_seen(traced: Server, models: tuple[ExactModel, ExactModel], mutant: str):
    """Negative control, with a fifth of the tokens: the same statistic must reject."""
    sample = generate(traced, PLAIN_T1, MUTANT_TOKENS, seed=12, mutant=mutant)
    family = judge(sample, transforms(sample, models, PLAIN_T1))
    report(mutant, sample, family)
    assert family.rejected()
