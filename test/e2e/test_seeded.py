"""Hypothesis: with a sampling seed the sampled tokens are plain decode's, whatever the draft length does.

Method: two servers with deterministic inference and the same fp32 weights, one plain, one drafting with a length that
changes every step; the same prompts, parameters and seeds. Symptom of a defect: noise drawn for the wrong
position or row, a filter applied in another order, a draft kept that the target would not have chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.equality import assert_pool_empty, assert_same, ids, set_gamma, steps_of
from support.prompts import mixed_prompts
from support.server import Server

pytestmark = pytest.mark.server

TOKENS = 64
SAMPLING: dict[str, dict[str, Any]] = {
    "T=1": {"temperature": 1.0},
    "T=.8 top-p .9 top-k 20": {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "T=.6": {"temperature": 0.6},
    "T=1.3 top-p .95": {"temperature": 1.3, "top_p": 0.95},
    "T=1 top-k 5": {"temperature": 1.0, "top_k": 5},
}


def seeded(kind: dict[str, Any], seed: int) -> dict[str, Any]:
    return {**kind, "max_new_tokens": TOKENS, "ignore_eos": True, "sampling_seed": seed}


@pytest.fixture(scope="module")
def speculating(server: Callable[[str], Server]) -> Server:
    return server("seeded")


@pytest.mark.parametrize("kind", SAMPLING)
def test_same_seeds_give_plain_tokens(plain: Server, speculating: Server, kind: str) -> None:
    """16 prompts with 16 seeds, all in one batch."""
    prompts = mixed_prompts(16, seed=31, longest=80)
    sampling = [seeded(SAMPLING[kind], 1000 + i) for i in range(16)]
    expected = ids(plain.generate_all(prompts, sampling, concurrency=16))
    speculating.cycle()
    with steps_of(speculating) as steps:
        replies = speculating.generate_all(prompts, sampling, concurrency=16)
    assert_same(ids(replies), expected, kind)
    assert sum(len(set(output)) >= 10 for output in expected) >= 14, "degenerate reference"
    steps.assert_speculated()


@pytest.mark.parametrize("gamma", ["cycle", pytest.param(1, marks=pytest.mark.full), 7])
def test_mixed_batch_equals_plain(plain: Server, speculating: Server, gamma: int | str) -> None:
    """Greedy and every kind of sampling in one batch, of different lengths, so that its composition changes.

    Every sampled request filters, if only by a top-k of nearly the vocabulary: SGLang lays its noise out by rank as
    soon as one request of the batch filters and by token id otherwise, so that in SGLang itself the seeded tokens of
    an unfiltered request change with its neighbours.
    """
    kinds = [{"temperature": 0}, *({"top_k": 300} | kind for kind in SAMPLING.values())]
    prompts = mixed_prompts(18, seed=32, longest=120)
    sampling = [seeded(kinds[i % len(kinds)], 77 * i) | {"max_new_tokens": 24 + 5 * i} for i in range(18)]
    expected = ids(plain.generate_all(prompts, sampling, concurrency=18))
    set_gamma(speculating, gamma)
    with steps_of(speculating) as steps:
        replies = speculating.generate_all(prompts, sampling, concurrency=9)
    assert_same(ids(replies), expected, f"mixed batch, gamma {gamma}")
    assert 0 < steps.accepted < steps.drafted, steps
    assert_pool_empty(speculating)


def test_other_seeds_give_other_tokens(speculating: Server) -> None:
    """Eight seeds of one prompt give eight different outputs, and each seed gives its output again at any batch."""
    prompts = [[17, 4, 200]] * 8
    sampling = [seeded(SAMPLING["T=1"], seed) for seed in range(8)]
    speculating.fixed(3)
    together = ids(speculating.generate_all(prompts, sampling, concurrency=8))
    assert len({tuple(output) for output in together}) == 8
    speculating.fixed(7)
    assert_same(ids(speculating.generate_all(prompts, sampling, concurrency=1)), together, "same seeds, alone")
