"""Hypothesis: drafts of every length are verified through FlashAttention 3, which reads the width of a pass once, when
it is made, and through FlashInfer, which plans a pass on the host, as through our own attention.

Method: real servers on a CPU whose target attends through SGLang's own backends, all of their Python and what they
plan, with the kernels in plain torch (support/gpu_attention.py); overlap on, page size 16 / chunked prefill. Greedy in
fp32 against gamma 0 of the same server. Symptom of a defect: queries of one request taken for another's, keys behind a
request's end, a length of another step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from support.equality import assert_pool_empty, assert_same, fixed_gamma, greedy, ids, set_gamma, steps_of
from support.prompts import mixed_prompts
from support.server import Server

pytestmark = [pytest.mark.server, pytest.mark.full]

GAMMAS = (1, 2, 3, 5, 7, "cycle")


class Case(NamedTuple):
    """A server, prompts, and what gamma 0 answers."""

    server: Server
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module", params=["fa3", "flashinfer"])
def case(request: pytest.FixtureRequest, server: Callable[[str], Server]) -> Case:
    it, prompts = server(request.param), mixed_prompts(12, seed=5, longest=90)
    it.fixed(0)
    return Case(it, prompts, ids(it.generate_all(prompts, greedy(64), concurrency=6)))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_every_draft_length_equals_plain(case: Case, gamma: int | str) -> None:
    set_gamma(case.server, gamma)
    with steps_of(case.server) as steps:
        replies = case.server.generate_all(case.prompts, greedy(64), concurrency=6)
    assert_same(ids(replies), case.expected, f"gamma {gamma}")
    steps.assert_speculated(fixed_gamma(gamma))
    assert_pool_empty(case.server)


def test_some_rows_do_not_speculate(case: Case) -> None:
    """Rows with a logit bias are not drafted for and share the verify pass of the others."""
    sampling = [{**greedy(48), **({"logit_bias": {"7": 4.0}} if i % 2 else {})} for i in range(len(case.prompts))]
    case.server.fixed(0)
    expected = ids(case.server.generate_all(case.prompts, sampling, concurrency=6))
    case.server.fixed(3)
    with steps_of(case.server) as steps:
        mixed = ids(case.server.generate_all(case.prompts, sampling, concurrency=6))
    assert_same(mixed, expected, "mixed rows")
    steps.assert_speculated(3)


def test_all_drafts_come_from_the_model(case: Case) -> None:
    forwards = case.server.state()["forwards"]
    assert forwards.get("draft_wrapped", 0) > 0
    assert not forwards.get("draft_native") and not forwards.get("target_native")
