"""Hypothesis: a whole draft pass over fixed buffers, as a CUDA graph holds it, changes nothing of what is generated.

Method: the function itself, called in place of being replayed, in real fp32 servers whose executor is switched off.
Symptom of a defect: a row of another batch, a position, slot or seed left over in a buffer (other tokens or none
accepted), padding that writes a request's KV (other tokens), or another way that ran (the counters).
`test_distribution.py` has the statistical test of the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.equality import (
    accept_counts,
    accept_length,
    assert_pool_empty,
    assert_same,
    fixed_gamma,
    greedy,
    ids,
    set_gamma,
    steps_of,
    whole_passes,
)
from support.prompts import mixed_prompts
from support.server import Server, running_server

pytestmark = pytest.mark.server

Reference = tuple[list[list[int]], list[list[int]]]


@pytest.mark.parametrize("gamma", [pytest.param(1, marks=pytest.mark.full), 7, "cycle"])
def test_greedy_tokens_are_plain_decodes(spec: Server, greedy_reference: Reference, gamma: int | str) -> None:
    """More prompts than run at once, so that batches of every size up to the largest pass by."""
    prompts, expected = greedy_reference
    with whole_passes(spec), steps_of(spec) as steps:
        set_gamma(spec, gamma)
        replies = spec.generate_all(prompts, greedy(128), concurrency=11)
    assert_same(ids(replies), expected, f"whole passes, gamma {gamma}")
    steps.assert_speculated(fixed_gamma(gamma))
    assert_pool_empty(spec)


def test_the_same_tokens_are_drafted(spec: Server, greedy_reference: Reference) -> None:
    """As token by token: every step accepts as many. Batches are padded: three requests in a bucket of four."""
    prompts, counts = greedy_reference[0][:3], []
    spec.fixed(5)
    for draft_graphs in ("off", "eager"):
        spec.set_policy(executor="wrapped", draft_graphs=draft_graphs)
        # In one message, so that they begin together: the last steps' draft length depends on who else is left.
        replies = spec.post("/generate", {"input_ids": prompts, "sampling_params": greedy(64)})
        counts.append(accept_counts(replies))
    spec.set_policy(executor="native", draft_graphs="auto")
    assert counts[0] == counts[1]


def test_seeded_tokens_are_plain_decodes(plain: Server, server: Callable[[str], Server]) -> None:
    """Greedy and filtered requests in one batch of changing composition."""
    kinds = [{"temperature": 0}, {"temperature": 1.0, "top_k": 300}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}]
    prompts = mixed_prompts(12, seed=33, longest=90)
    sampling = [
        {**kinds[i % 3], "max_new_tokens": 20 + 5 * i, "ignore_eos": True, "sampling_seed": 91 * i} for i in range(12)
    ]
    expected = ids(plain.generate_all(prompts, sampling, concurrency=12))
    seeded = server("seeded")
    with whole_passes(seeded), steps_of(seeded) as steps:
        seeded.cycle()
        replies = seeded.generate_all(prompts, sampling, concurrency=7)
    assert_same(ids(replies), expected, "whole passes, seeded")
    assert 0 < steps.accepted < steps.drafted, steps


def test_the_shadow_is_written_behind_every_forward(spec: Server, greedy_reference: Reference) -> None:
    """Chunked prefill, plain steps and verify passes; then the same prompts from the radix cache. Drafts read it,
    which changes some of them, and no token that is committed."""
    prompts, expected = greedy_reference
    lengths, counts = {}, {}
    for shadow in ("off", "int4"):
        with whole_passes(spec, kv_shadow=shadow, kv_shadow_from=0):
            spec.cycle()
            for cache in ("empty", "warm"):
                if cache == "empty":
                    spec.flush_cache()
                replies = spec.generate_all(prompts, greedy(128), concurrency=11)
                assert_same(ids(replies), expected, f"shadow {shadow}, cache {cache}")
                lengths[shadow, cache] = accept_length(replies)
            spec.fixed(5)
            counts[shadow] = accept_counts(spec.generate_all(prompts[:3], greedy(64), concurrency=1))
            state = spec.state()["kv_shadow"]
        assert (state is None) == (shadow == "off")
    assert state["stored_slots"] > 1000 and state["valid_slots"] > 1000
    for cache in ("empty", "warm"):
        assert lengths["int4", cache] > 0.9 * lengths["off", cache]
    assert counts["off"] != counts["int4"]
    assert_pool_empty(spec)


@pytest.mark.full
def test_an_fp8_shadow_changes_no_token(
    flat_model: Callable[[str, int], Path], greedy_reference: Reference, tmp_path: Path
) -> None:
    """Which is for GPUs: on a CPU plain torch alone reads it, so this server computes everything with that."""
    prompts, expected = (part[:8] for part in greedy_reference)
    flags = (
        *("--dtype", "float32", "--context-length", "512", "--random-seed", "1", "--max-total-tokens", "8192"),
        *("--er-kernels", "reference", "--er-executor", "wrapped", "--er-draft-graphs", "eager"),
        *("--er-kv-shadow", "fp8", "--er-kv-shadow-from", "0", "--er-policy", "fixed", "--er-gamma", "5"),
    )
    env = {"SGLANG_ER_CPU_THREADS": "1"}
    with running_server(flat_model("qwen3", 0), tmp_path / "fp8.log", *flags, env=env) as server:
        replies = server.generate_all(prompts, greedy(128), concurrency=8)
        state = server.state()
        assert_same(ids(replies), expected, "fp8 shadow")
        assert state["kv_shadow"]["format"] == "fp8" and state["kv_shadow"]["stored_slots"] > 500
        assert state["forwards"]["draft_loop"] > 0 and accept_length(replies) > 1.5
        server.fixed(3)  # waits for an idle server
        refused = server.request("POST", "/er/policy", json={"executor": "native"})
        assert refused.status_code == 400 and "--er-kv-shadow int8" in refused.text
        assert server.state()["config"]["values"]["executor"] == "wrapped"
