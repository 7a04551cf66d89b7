"""Hypothesis: every supported architecture speculates exactly, also with experts on two ranks and with several engines.

Method: gamma 0 and a draft length that changes every step in the same server must give the same greedy tokens; sampled
requests must finish. Symptom of a defect: a layer that computes with the twin's weights in the verify pass, or a model
code path that the dual-precision wrapper does not know.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.equality import assert_pool_empty, assert_same, greedy, ids, lively, retractions, steps_of
from support.prompts import mixed_prompts
from support.server import Server

pytestmark = pytest.mark.server

LAYERS = 4
# Architecture -> the shared server that runs it (test/conftest.py). qkv, o, gate_up, down per layer, and the lm_head;
# a MoE layer has a router in place of a dense MLP, and two packed weights for all its experts.
SERVERS = {
    "qwen3": ("spec", 4 * LAYERS + 1),
    "llama": ("paged", 4 * LAYERS + 1),
    "qwen3_moe": ("moe", 5 * LAYERS + 1),
    "mistral": ("dp", 4 * LAYERS + 1),
    "qwen2": ("qwen2", 4 * LAYERS + 1),
}
MARKS = {"qwen2": [pytest.mark.full], "mistral": [pytest.mark.last]}
ARCHITECTURES = [pytest.param(arch, marks=MARKS.get(arch, [])) for arch in SERVERS]


@pytest.fixture
def running(arch: str, server: Callable[[str], Server]) -> Server:
    return server(SERVERS[arch][0])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_equals_gamma_0(arch: str, running: Server) -> None:
    """40 prompts x 64 tokens, 8 at a time; the MoE model loops on most of them, the others on few."""
    prompts = mixed_prompts(40, seed=61, longest=100)
    running.fixed(0)
    expected = ids(running.generate_all(prompts, greedy(64), concurrency=8))
    lively(prompts, expected, count=8)
    running.cycle()
    running.flush_cache()
    with steps_of(running) as steps:
        replies = running.generate_all(prompts, greedy(64), concurrency=8)
    assert_same(ids(replies), expected, arch)
    steps.assert_speculated()
    if arch == "mistral":
        assert retractions(replies) > 0, "this server is meant to retract under overlap scheduling"
    assert_pool_empty(running)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sampled_requests_finish(arch: str, running: Server) -> None:
    """T=1 with and without filters: all tokens arrive, from the vocabulary, and not twice the same text."""
    prompts = mixed_prompts(8, seed=62, longest=60)
    kinds = [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.02}]
    sampling = [kinds[i % 2] | {"max_new_tokens": 48, "ignore_eos": True} for i in range(8)]
    running.cycle()
    with steps_of(running) as steps:
        outputs = ids(running.generate_all(prompts, sampling, concurrency=8))
    assert [len(output) for output in outputs] == [48] * 8
    assert all(0 <= token < 320 for output in outputs for token in output)
    assert outputs != ids(running.generate_all(prompts, sampling, concurrency=8))
    assert 0 < steps.accepted < steps.drafted, steps


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_twin_covers_every_linear(arch: str, running: Server) -> None:
    """Every engine's twin has all linears, experts and the lm_head; nothing stays exact."""
    for engine in running.get("/er/state")["engines"]:
        twin = engine["twin"]
        assert twin["layers_kept_exact"] == []
        assert twin["layers"] == SERVERS[arch][1]


@pytest.mark.last
def test_both_engines_speculate(server: Callable[[str], Server]) -> None:
    """--dp-size 2: the policy reaches both engines and both draft."""
    dp = server("dp")
    dp.cycle()
    before = dp.get("/er/state")["engines"]
    dp.generate_all(mixed_prompts(8, seed=63, longest=40), greedy(32), concurrency=8)
    after = dp.get("/er/state")["engines"]
    assert len(after) == 2
    for old, new in zip(before, after, strict=True):
        assert new["policy"]["policy"] == "cycle"
        assert new["steps"]["drafted_tokens"] > old["steps"]["drafted_tokens"]
