"""Hypothesis: the native executor computes what SGLang's model code computes, with and without the KV shadow.

Method: one fp32 server, the executor and its options switched while it is idle; greedy outputs must stay plain decode's
and, with activations that are not rounded, the accepted drafts must be the same too. Symptom of a defect: other
tokens (target), other accept counts (draft), or counters that show that something else ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.equality import accept_counts, accept_length, assert_pool_empty, assert_same, greedy, ids
from support.server import Server

pytestmark = pytest.mark.server

DEFAULTS = {"executor": "native", "draft_activations": "int8", "kv_shadow": "int4", "kv_shadow_from": 4096}
Reference = tuple[list[list[int]], list[list[int]]]


@pytest.fixture
def switched(spec: Server) -> Iterator[Server]:
    """The `spec` server, whose options are put back afterwards."""
    yield spec
    spec.set_policy(**DEFAULTS)


def forwards(server: Server) -> dict[str, int]:
    return dict(server.state()["forwards"])


def ran(server: Server, before: dict[str, int]) -> set[str]:
    return {name for name, count in forwards(server).items() if count > before.get(name, 0)}


@pytest.mark.parametrize("gamma", [0, 3])
def test_wrapped_gives_the_same_tokens(switched: Server, greedy_reference: Reference, gamma: int) -> None:
    prompts, expected = (part[:8] for part in greedy_reference)
    ways = {"native": {"target_native"}, "wrapped": {"target_wrapped"}}
    if gamma:
        ways = {name: {*way, f"draft_{name}"} for name, way in ways.items()}
    for name, way in ways.items():
        switched.set_policy(executor=name, policy="fixed", gamma=gamma)
        before = forwards(switched)
        replies = switched.generate_all(prompts, greedy(128), concurrency=8)
        assert ran(switched, before) == way
        assert_same(ids(replies), expected, f"executor {name}, gamma {gamma}")


def test_native_and_wrapped_draft_the_same(switched: Server, greedy_reference: Reference) -> None:
    """Not a token of the drafts differs, so every step accepts as many."""
    prompts = greedy_reference[0][:6]
    counts = []
    for name in ("native", "wrapped"):
        switched.set_policy(executor=name, draft_activations="exact", policy="fixed", gamma=5)
        # One at a time: a step's gamma is cut by the request of its batch that ends first.
        counts.append(accept_counts(switched.generate_all(prompts, greedy(64), concurrency=1)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("kv_shadow", "share"), [("int8", 0.53), ("int4", 0.29)])
def test_shadow_changes_no_token(switched: Server, greedy_reference: Reference, kv_shadow: str, share: float) -> None:
    """Heads of 32 elements carry more scales than those of real models: 26.6 % is for 64 and more."""
    prompts, expected = greedy_reference
    lengths = {}
    for name in ("off", kv_shadow):
        switched.set_policy(kv_shadow=name, kv_shadow_from=0, policy="fixed", gamma=5)
        replies = switched.generate_all(prompts, greedy(128), concurrency=16)
        assert_same(ids(replies), expected, f"shadow {name}")
        lengths[name] = accept_length(replies)
    shadow = switched.state()["kv_shadow"]
    assert shadow["stored_slots"] > 1000 and shadow["share_of_kv_pool"] < share
    assert lengths[kv_shadow] > 0.9 * lengths["off"]
    assert_pool_empty(switched)


def test_short_contexts_need_no_shadow(switched: Server, greedy_reference: Reference) -> None:
    switched.set_policy(kv_shadow="int8", kv_shadow_from=4096, policy="fixed", gamma=3)
    switched.generate_all(greedy_reference[0][:2], greedy(16), concurrency=2)
    assert switched.state()["kv_shadow"] is None


def test_other_models_say_that_they_run_wrapped(server: Callable[[str], Server]) -> None:
    moe = server("moe")
    moe.fixed(3)
    moe.generate([1, 2, 3], greedy(16))
    assert "draft_wrapped" in forwards(moe) and "draft_native" not in forwards(moe)
    assert moe.log_text().count("run through SGLang's model code") == 2  # once a rank
