"""Policies in turn: who runs when, with what, and what is left of the server's own policy afterwards."""

from __future__ import annotations

from collections import Counter

import pytest

from sglang_er.rollout import bench, contest
from sglang_er.rollout.contest import Contest
from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.prompts import Request

ROUNDS = [[Request((5, 6), 12), Request((7, 8), 30)], [Request((5, 9), 6), Request((7, 9), 9)]]


def run(server, arms: str):
    plan = Contest(contest.parse_arms(arms), ROUNDS, at_once=2)
    return plan, contest.run(server, plan, lambda *_: None, lambda: 0.0)


def test_names_are_policies():
    assert contest.parse_arms("goodput, fixed:3,goodput+early_stop=false") == {
        "plain": {"policy": "fixed", "gamma": 0},
        "goodput": {"policy": "goodput"},
        "fixed:3": {"policy": "fixed", "gamma": 3},
        "goodput+early_stop=false": {"policy": "goodput", "early_stop": "false"},
    }


@pytest.mark.parametrize("arms", ["", "fixed:x", "goodput:3", "goodput+early_stop"])
def test_names_that_say_nothing_are_refused(arms: str):
    with pytest.raises(ValueError, match="--arms"):
        contest.parse_arms(arms)


def test_everybody_comes_at_every_place_equally_often():
    arms = ["a", "b", "c"]
    orders = [contest.order_of(number, arms) for number in range(6)]
    assert all(sorted(order) == arms for order in orders)
    for place in range(3):
        assert set(Counter(order[place] for order in orders).values()) == {2}


def test_every_arm_does_the_same_work_under_its_policy(counting_server):
    plan, blocks = run(counting_server, "fixed:2,fixed:1")
    for name in ("plain", "fixed:2", "fixed:1"):
        assert [block.tokens for block in blocks[name]] == [42, 15]
    assert set(blocks["fixed:2"][0].steps.steps_by_gamma) == {2}
    assert set(blocks["plain"][0].steps.steps_by_gamma) == {0}
    content = contest.to_json(plan, blocks)
    assert content["arms"]["plain"]["speed_up"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert content["rounds"] == [[12, 30], [6, 9]]


def test_the_servers_policy_is_as_before_even_when_a_request_fails(counting_server):
    before = bench.switchable(counting_server.state())
    run(counting_server, "fixed:1")
    assert bench.switchable(counting_server.state()) == before

    def refuses(*args, **kwargs):
        raise RolloutError("refused")

    counting_server.generate = refuses
    with pytest.raises(RolloutError):
        run(counting_server, "fixed:1")
    assert bench.switchable(counting_server.state()) == before
