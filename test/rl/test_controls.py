"""Negative controls: what the suite's checks must be able to see, on real servers that are broken on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.mutants import BROKEN
from support.server import Server

from sglang_er.rollout.conformance import distribution, suite
from sglang_er.rollout.conformance.check import Broken, by_id
from sglang_er.rollout.conformance.session import Session

pytestmark = pytest.mark.server

# The setting of C27 in which every broken verifier shows, with four times its requests: p is then far below the level.
# With twice as many residual_is_p had p from 7e-12 to 4e-6, and once did not show.
CONTROL = "T=0.7, top_k"
CONTROL_REQUESTS = 4 * distribution.REQUESTS


def reason_of_failure(session: Session, name: str) -> str:
    (check,) = by_id(suite.CHECKS, [name])
    found = suite.run_one(session, check)
    assert found.status == "failed", (found.status, found.reason)
    assert not found.gone, found.reason
    return found.reason


def test_c15_fails_without_requantization(on_spec: Session, updated_spec: Any) -> None:
    """The session has measured the accept length while the twin was remade; then it no longer is."""
    server: Server = updated_spec.server
    on_spec.measure_own()
    server.set_policy(requantize=False)
    broken = Session(server.url, on_spec.options)
    try:
        assert "L8" in (said := reason_of_failure(broken, "C15")) and "does not follow" in said
    finally:
        broken.close()
        server.set_policy(requantize=True)


@pytest.mark.parametrize(
    ("name", "part"),
    [("C13", "begin_weight_update"), ("C21", "/get_weight_version: 404"), ("C28", "spec_accept_token_num")],
)
def test_what_stock_sglang_lacks_is_seen(on_spec: Session, updated_spec: Any, name: str, part: str) -> None:
    """With the compatibility parts off a server of ours answers as stock SGLang 0.5.21 does."""
    updated_spec.server.set_policy(rl_compat="none")
    said = reason_of_failure(on_spec, name)
    assert said.startswith("contract (") and part in said, said


@pytest.fixture
def with_mutant(updated_spec: Any) -> Iterator[Any]:
    """with_mutant(name) breaks the verifier of the `spec` server."""
    server: Server = updated_spec.server
    yield lambda name: server.set_policy(mutant=name)
    server.set_policy(mutant=None)


@pytest.mark.parametrize("mutant", BROKEN)
def test_c27_sees_a_broken_verifier(on_spec: Session, with_mutant: Any, mutant: str) -> None:
    """test/e2e/test_distribution.py judges 100,000 tokens with the exact model; this is the suite's own statistic."""
    with_mutant(mutant)
    on_spec.draft()
    with pytest.raises(Broken, match="not drawn from") as said:
        distribution.judged(on_spec, CONTROL, CONTROL_REQUESTS)
    print(mutant, said.value)


def test_c27_passes_a_biased_draft(on_spec: Session, with_mutant: Any) -> None:
    """Any draft is corrected as long as its own distribution is the one reported."""
    with_mutant("biased_draft")
    on_spec.draft()
    print(distribution.judged(on_spec, CONTROL, CONTROL_REQUESTS))


@pytest.mark.parametrize("mutant", ["accept_all", "accept_none"])
def test_c03_holds_whatever_is_accepted(on_spec: Session, with_mutant: Any, mutant: str) -> None:
    """Logprobs are the policy's for tokens that came from the draft alone, and where no draft is accepted."""
    with_mutant(mutant)
    (check,) = by_id(suite.CHECKS, ["C03"])
    found = suite.run_one(on_spec, check)
    assert found.status == "passed", found.reason
