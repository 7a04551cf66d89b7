"""Hypothesis: at temperature 0 speculation returns plain decode's tokens, whatever is drafted and however it is run.

Method: the same fp32 weights behind a plain and a speculating server (chunked prefill 64, overlap, page size 1), and a
second architecture with page size 16, no overlap and forced retraction against gamma 0 of its own. Symptom of a
defect: an output that differs from some token on (KV overwritten, wrong position, wrong row), or a slot never freed.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.equality import (
    assert_pool_empty,
    assert_same,
    cached,
    fixed_gamma,
    greedy,
    ids,
    lively,
    prefill_chunks,
    retractions,
    set_gamma,
    steps_of,
)
from support.prompts import mixed_prompts, random_prompt
from support.server import Server

pytestmark = pytest.mark.server

CONTEXT = 512
CHUNK = 64
GAMMAS = (1, 3, 5, 7, "cycle")
Reference = tuple[list[list[int]], list[list[int]]]
full = pytest.mark.full


@pytest.mark.parametrize("gamma", GAMMAS)
def test_batch_equals_plain(spec: Server, greedy_reference: Reference, gamma: int | str) -> None:
    """32 prompts x 128 tokens, 16 at a time, prompts prefilled in chunks from an empty cache."""
    prompts, expected = greedy_reference
    set_gamma(spec, gamma)
    spec.flush_cache()
    log_start = len(spec.log_text())
    with steps_of(spec) as steps:
        replies = spec.generate_all(prompts, greedy(128), concurrency=16)
    assert_same(ids(replies), expected, f"gamma {gamma}, batch 16")
    steps.assert_speculated(fixed_gamma(gamma))
    chunks = prefill_chunks(spec.log_text()[log_start:])
    assert max(chunks) <= CHUNK < max(map(len, prompts)), "the prompts were not prefilled in chunks"
    assert_pool_empty(spec)


@pytest.mark.parametrize("gamma", [pytest.param(g, marks=[full] if g in (1, 3, 5) else []) for g in GAMMAS])
def test_single_request_equals_plain(
    spec: Server, greedy_reference: Reference, gamma: int | str, request: pytest.FixtureRequest
) -> None:
    """The same, one request at a time; 4 prompts, all 32 in the full matrix."""
    prompts, expected = greedy_reference
    count = 32 if request.config.getoption("--full") else 4
    set_gamma(spec, gamma)
    with steps_of(spec) as steps:
        replies = spec.generate_all(prompts[:count], greedy(128), concurrency=1)
    assert_same(ids(replies), expected[:count], f"gamma {gamma}, batch 1")
    steps.assert_speculated(fixed_gamma(gamma))


def test_the_measuring_policy_equals_plain(spec: Server, greedy_reference: Reference) -> None:
    """Draft lengths chosen from measured cost and acceptance, 16 requests at a time and alone."""
    prompts, expected = greedy_reference
    spec.set_policy(policy="goodput")
    before = spec.state()["controller"]
    with steps_of(spec) as steps:
        replies = spec.generate_all(prompts, greedy(128), concurrency=16)
        replies += spec.generate_all(prompts[:4], greedy(128), concurrency=1)
    assert_same(ids(replies), expected + expected[:4], "policy goodput")
    after = spec.state()["controller"]
    assert before["cost"]["plain_step_seconds"] > 0, "costs were not seeded at start-up"
    assert any(gamma > 0 for gamma, count in steps.by_gamma.items() if count), steps
    drafting = sum(count for gamma, count in steps.by_gamma.items() if gamma > 0)
    learnt = after["cost"]["observed"]["verify"] - before["cost"]["observed"]["verify"]
    assert 0.9 * drafting <= learnt <= drafting, "steps were not learnt from"
    assert after["cost"]["ignored"] - before["cost"]["ignored"] < 0.1 * sum(steps.by_gamma.values())
    assert sum(after["acceptance"]["drafted_at"]) > sum(before["acceptance"]["drafted_at"])


def test_drafts_that_stop_early_equal_plain(spec: Server, greedy_reference: Reference) -> None:
    """Chains that end wherever the twin is not sure, at every length up to 7."""
    prompts, expected = greedy_reference
    spec.set_policy(policy="fixed", gamma=7, stop=0.022)  # the flat model is never sure
    try:
        with steps_of(spec) as steps:
            replies = spec.generate_all(prompts, greedy(128), concurrency=16)
    finally:
        spec.set_policy(stop=None)
    assert_same(ids(replies), expected, "early stop")
    assert sum(steps.by_gamma.get(gamma, 0) > 3 for gamma in range(1, 8)) > 3, steps
    assert_pool_empty(spec)


def test_radix_hits_equal_plain(spec: Server, greedy_reference: Reference) -> None:
    """Cached KV is committed KV: prompts again, then prompts that go on from the middle of an output, whose KV
    the verify pass wrote (draft KV left in the cache would change the continuation)."""
    prompts, expected = (part[:16] for part in greedy_reference)
    spec.cycle()
    spec.flush_cache()
    first = spec.generate_all(prompts, greedy(64), concurrency=16)
    again = spec.generate_all(prompts, greedy(64), concurrency=16)
    grown = [prompt + output[:48] for prompt, output in zip(prompts, expected)]
    onward = spec.generate_all(grown, greedy(80), concurrency=16)

    assert cached(first) == [0] * 16
    assert all(hit >= len(prompt) - 1 for hit, prompt in zip(cached(again), prompts)), cached(again)
    assert all(hit >= len(prompt) - 1 for hit, prompt in zip(cached(onward), grown)), cached(onward)
    assert_same(ids(first), [output[:64] for output in expected], "first time")
    assert_same(ids(again), [output[:64] for output in expected], "radix hit on the prompt")
    assert_same(ids(onward), [output[48:] for output in expected], "radix hit on generated tokens")
    assert_pool_empty(spec)


@pytest.fixture(scope="module")
def context_end_reference(plain: Server) -> Reference:
    """Prompts that leave 7..60 tokens to the context end and are asked for all of them (SGLang takes prompts of at most
    context - 7 tokens, and its plain decode ends two tokens before the context does)."""
    rng = random.Random(11)
    room = (7, 8, 9, 10, 12, 17, 33, 60)
    prompts = [random_prompt(rng, CONTEXT - n) for n in room]
    outputs = ids(plain.generate_all(prompts, [greedy(n) for n in room], concurrency=8))
    assert [len(output) for output in outputs] == [n - 2 for n in room]
    return prompts, outputs


@pytest.mark.parametrize("gamma", GAMMAS)
def test_context_end_and_neighbours(
    spec: Server, greedy_reference: Reference, context_end_reference: Reference, gamma: int | str
) -> None:
    """Requests that run into the context end are exact, and so are eight others in the same batches, whose rows
    an overflowing slot table would overwrite."""
    ends, ends_expected = context_end_reference
    near, near_expected = (part[:8] for part in greedy_reference)
    mixed = [prompt for pair in zip(near, ends) for prompt in pair]
    tokens = [n for pair in zip([96] * 8, (CONTEXT - len(end) for end in ends)) for n in pair]
    set_gamma(spec, gamma)
    with steps_of(spec) as steps:
        replies = spec.generate_all(mixed, [greedy(n) for n in tokens], concurrency=16)
    assert_same(ids(replies)[1::2], ends_expected, f"gamma {gamma}, context end")
    assert_same(ids(replies)[::2], [output[:96] for output in near_expected], f"gamma {gamma}, neighbours")
    assert all(reply["meta_info"]["finish_reason"]["type"] == "length" for reply in replies)
    assert steps.drafted > steps.accepted > 0, steps
    assert_pool_empty(spec)


def test_beyond_the_context_is_refused(spec: Server) -> None:
    """One token more than fits is a 400, as from plain SGLang, and the server lives on."""
    reply = spec.request("POST", "/generate", json={"input_ids": [5] * 500, "sampling_params": greedy(13)})
    assert reply.status_code == 400, reply.text
    assert spec.alive()


@pytest.fixture(scope="module")
def paged_reference(server: Callable[[str], Server]) -> Reference:
    """Gamma 0 of the `paged` server itself: 32 prompts x 96 tokens of llama, those with a lively output out of 64."""
    paged = server("paged")
    paged.fixed(0)
    prompts = mixed_prompts(64, seed=3, longest=150)
    outputs = ids(paged.generate_all(prompts, greedy(96), concurrency=8))
    return lively(prompts, outputs, count=32)


@pytest.mark.parametrize("gamma", [pytest.param(g, marks=[full] if g in (1, 3, 5) else []) for g in GAMMAS])
def test_paged_with_retraction(server: Callable[[str], Server], paged_reference: Reference, gamma: int | str) -> None:
    """Page size 16, no overlap, chunked prefill, and a pool of 2048 tokens for 16 requests that want 2700."""
    paged = server("paged")
    prompts, expected = paged_reference
    set_gamma(paged, gamma)
    paged.flush_cache()
    with steps_of(paged) as steps:
        replies = paged.generate_all(prompts, greedy(96), concurrency=16)
    assert_same(ids(replies), expected, f"paged, gamma {gamma}")
    assert retractions(replies) > 0, "no request was retracted: the test does not test what it says"
    steps.assert_speculated(fixed_gamma(gamma))
    assert_pool_empty(paged)
