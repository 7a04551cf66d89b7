"""A run of `bench rollout`: what is sent in which order, and that the server's policy is as before."""

from __future__ import annotations

import pytest

from sglang_er.rollout import bench
from sglang_er.rollout.bench import Settings
from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.measure import PLAIN
from sglang_er.rollout.prompts import Request

SPECULATIVE = {"policy": "fixed", "gamma": 2}


def settings(**changes) -> Settings:
    batches = [[Request((5, 6), 12), Request((7, 8), 30)], [Request((5, 9), 6), Request((7, 9), 9)]]
    usual = {"batches": batches, "at_once": 2, "blocks": 4, "temperature": 1.0, "policy": SPECULATIVE}
    return Settings(**usual | changes)


def measure(server, chosen: Settings) -> bench.Result:
    return bench.measure_rollouts(server, chosen, lambda *_: None, lambda: 0.0)


def test_pairs_go_through_the_seeds_and_every_response_has_its_exact_length(counting_server):
    result = measure(counting_server, settings())
    assert [block.tokens for block in result.comparison.plain] == [42, 15]
    assert [block.tokens for block in result.comparison.speculative] == [42, 15]
    assert [block.steps.steps_by_gamma for block in result.comparison.speculative] == [{2: 14}, {2: 5}]
    assert result.policy == SPECULATIVE


def test_prompts_are_in_the_cache_before_a_pair_and_outside_its_blocks(counting_server):
    measure(counting_server, settings())
    sent = [tokens for _, tokens in counting_server.requests]
    assert sorted(sent[:2]) == sorted(sent[2:4]) == [2, 2]  # the first use of everything, then the first pair
    assert sorted(sent[4:6]) == [12, 30]
    assert counting_server.flushed == 0


def test_cold_blocks_empty_the_cache_instead(counting_server):
    measure(counting_server, settings(cold=True))
    assert counting_server.flushed == 4


def test_the_servers_policy_is_as_before_even_when_a_request_fails(counting_server):
    before = bench.switchable(counting_server.state())
    measure(counting_server, settings())
    assert bench.switchable(counting_server.state()) == before

    def refuses(prompt, sampling, top_logprobs=0):
        raise RolloutError("refused")

    counting_server.generate = refuses
    with pytest.raises(RolloutError):
        measure(counting_server, settings())
    assert bench.switchable(counting_server.state()) == before


def test_probes_visit_every_gamma_that_the_server_can_and_give_the_oracle(counting_server):
    result = measure(counting_server, settings(probe=True))
    assert {gamma for _, gamma in result.probed.costs} == {0, 1, 2, 3}
    saving = result.saving()
    assert saving is not None
    # Everything is accepted: a token takes 1 s plainly, 2.5 / 4 s with three drafts.
    assert saving.gammas == {1: 3, 2: 3}
    assert saving.plain_computed == pytest.approx(39.0)
    assert saving.oracle_computed == pytest.approx(39.0 * 2.5 / 4)
    assert measure(counting_server, settings()).saving() is None


def test_a_timeline_belongs_to_each_arm_of_a_pair(counting_server):
    result = measure(counting_server, settings(sample_seconds=0.01))
    assert [sorted(arms) for arms in result.timelines] == [["plain", "speculative"]] * 2
    rows = result.timelines[0]["speculative"]
    assert rows and any(row.gamma == 2 for row in rows)


def test_the_policy_is_the_servers_own_with_what_was_asked_for(counting_server):
    state = counting_server.state()
    assert bench.policy_of(state, {})["gamma"] == 3
    assert bench.policy_of(state, {"policy": "threshold"})["thresholds"] == [[2, 3]]
    with pytest.raises(ValueError, match="plain decode itself"):
        bench.policy_of(state, dict(PLAIN))


def test_probe_sizes_end_at_the_largest_batch():
    assert bench.probe_sizes(1) == [1]
    assert bench.probe_sizes(12) == [1, 2, 4, 8, 12]
    assert bench.probe_sizes(32) == [1, 2, 4, 8, 16, 32]
