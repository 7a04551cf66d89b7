"""Hypothesis: drafts of every length are verified through FlashAttention 3, which reads the width of a pass once, when
it is made, and through FlashInfer, which plans a pass on the host, as through our own attention.

Method: real servers on a CPU whose target attends through SGLang's own backends, all of their Python and what they
plan, with the kernels in plain torch (support/gpu_attention.py); overlap on, page size 16 / chunked prefill. Greedy in
fp32 against gamma 0 of the same server. Symptom of a defect: queries of one request taken for another's, keys behind a
request's end, a length of another step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from support.equality import assert_pool_empty, assert_same, fixed_gamma, greedy, ids, set_gamma, steps_of
from support.prompts import mixed_prompts
from support.server import Server

pytestmark = [pytest.mark.server, pytest.mark.full]

GAMMAS = (1, 2, 3, 5, 7, "cycle")


class Case(NamedTuple):
    """A server, prompts, tokens of an answer, and what gamma 0 answers."""

    server: Server
    prompts: list[list[int]]
    tokens: int
    expected: list[list[int]]

    def ask(self, **sampling: Any) -> list[list[int]]:
        """All prompts, half of them at once; `sampling` for every other one."""
        each = [{**greedy(self.tokens), **(sampling if i % 2 else {})} for i in range(len(self.prompts))]
        return ids(self.server.generate_all(self.prompts, each, concurrency=len(self.prompts) // 2))


def case_of(server: Server, count: int, longest: int, tokens: int) -> Case:
    case = Case(server, mixed_prompts(count, seed=5, longest=longest), tokens, [])
    server.fixed(0)
    return case._replace(expected=case.ask())


def assert_equals_plain(case: Case, gamma: int | str) -> None:
    set_gamma(case.server, gamma)
    with steps_of(case.server) as steps:
        replies = case.ask()
    assert_same(replies, case.expected, f"gamma {gamma}")
    steps.assert_speculated(fixed_gamma(gamma))
    assert_pool_empty(case.server)


def assert_recorded(server: Server) -> None:
    """There are graphs of every width, and no verify pass went without one (nor plain decode: called_graphs.py)."""
    graphs = server.state()["graphs"]["verify"]
    assert graphs["gammas"] == list(range(1, 8)) and graphs["verify_recorded"] > 5, graphs
    assert graphs["verify_eager"] == 0, graphs


@pytest.fixture(scope="module", params=["fa3", "fa3 graphs", "flashinfer"])
def case(request: pytest.FixtureRequest, server: Callable[[str], Server]) -> Case:
    return case_of(server(request.param), 12, 90, 64)


@pytest.fixture(scope="module")
def triton(server: Callable[[str], Server]) -> Case:
    """Few tokens: a forward takes half a second in Triton's interpreter."""
    return case_of(server("triton graphs"), 6, 20, 16)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_every_draft_length_equals_plain(case: Case, gamma: int | str) -> None:
    assert_equals_plain(case, gamma)


@pytest.mark.parametrize("gamma", [2, "cycle"])
def test_tritons_graphs_equal_plain(triton: Case, gamma: int | str) -> None:
    """SGLang's own kernels, in graphs of every width; ours in whole draft passes and in verification."""
    assert_equals_plain(triton, gamma)
    assert_recorded(triton.server)
    state = triton.server.state()
    assert state["forwards"]["draft_loop"] > 20, state["forwards"]
    ours = {op for op, name in state["kernels"].items() if name == "triton"}
    assert ours >= {"w4a16_linear", "paged_attention", "draft_sample", "softmax_rows", "verify_chain"}, state["kernels"]


def test_some_rows_do_not_speculate(case: Case) -> None:
    """Rows with a logit bias are not drafted for and share the verify pass of the others."""
    biased = {"logit_bias": {"7": 4.0}}
    case.server.fixed(0)
    expected = case.ask(**biased)
    case.server.fixed(3)
    with steps_of(case.server) as steps:
        mixed = case.ask(**biased)
    assert_same(mixed, expected, "mixed rows")
    steps.assert_speculated(3)


def test_all_drafts_come_from_the_model(case: Case, request: pytest.FixtureRequest) -> None:
    state = case.server.state()
    assert state["forwards"].get("draft_wrapped", 0) > 0
    assert not state["forwards"].get("draft_native") and not state["forwards"].get("target_native")
    if "graphs" in request.node.name:
        assert_recorded(case.server)
    else:
        assert state["graphs"]["verify"] is None
