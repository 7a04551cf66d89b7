"""Blocks, pairs and counters: what is subtracted, what is added, and when another pair is measured."""

from __future__ import annotations

import threading
import time

import pytest

from sglang_er.rollout import measure
from sglang_er.rollout.client import Response
from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.measure import PLAIN, Block, Comparison
from sglang_er.rollout.steps import Steps
from sglang_er.rollout.workload import make_batch


class FakeClient:
    """Answers every rollout rightly or not at all; its counters are totals, as the engine's are."""

    def __init__(self, answer: str = "right", gamma: int = 3) -> None:
        self.answer, self.gamma = answer, gamma
        self.policies: list[dict[str, object]] = []
        self.sent: list[str] = []
        self.totals = {"request_steps": 100, "committed_tokens": 1000, "accepted_drafts": 50}
        self.steps_by_gamma = {"0": 7}
        self.lock = threading.Lock()

    def set_policy(self, changes):
        self.policies.append(dict(changes))

    def state(self):
        return {"steps": {**self.totals, "steps_by_gamma": dict(self.steps_by_gamma), "speculating_request_steps": 20}}

    def _respond(self, endpoint: str, text: str) -> Response:
        with self.lock:
            self.sent.append(endpoint)
            gamma = str(0 if self.policies[-1] == PLAIN else self.gamma)
            self.steps_by_gamma[gamma] = self.steps_by_gamma.get(gamma, 0) + 2
            self.totals["request_steps"] += 2
            self.totals["committed_tokens"] += 5
        if self.answer == "error":
            raise RolloutError("refused")
        return Response(text=text, tokens=5, finish="length" if endpoint == "openai" else "stop")

    def chat(self, prompt, max_tokens, temperature):
        return self._respond("openai", "=0")

    def generate(self, text, sampling, top_logprobs=0):
        return self._respond("generate", "=1")


def steps(gamma: int, count: int, drafted: int = 0, accepted: int = 0) -> Steps:
    return Steps({gamma: count}, count, count + accepted, accepted, drafted)


def block(rate: float, gamma: int = 0) -> Block:
    return Block(10.0, 20.0, int(rate * 10), [1.0, 0.0], 0, steps(gamma, 10))


def test_a_block_uses_both_endpoints_and_reports_only_its_own_steps():
    client = FakeClient()
    done = measure.run_block(client, {"policy": "fixed", "gamma": 3}, make_batch(4))
    assert sorted(client.sent) == ["generate", "generate", "openai", "openai"]
    assert done.tokens == 20 and done.cut == 2 and len(done.rewards) == 4
    assert done.steps.steps_by_gamma == {3: 8}
    assert done.steps.committed_tokens == 20


def test_a_closed_loop_keeps_no_more_requests_in_flight_than_it_should():
    running, most, lock = 0, 0, threading.Lock()

    def job() -> Response:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return Response("", 3, "length")

    block, responses = measure.run_jobs(FakeClient(), PLAIN, [job] * 7, at_once=2)
    assert most == 2 and len(responses) == 7
    assert block.tokens == 21 and block.cut == 7 and block.rewards == []


def test_pairs_turn_their_order_so_that_a_drift_favours_nobody():
    client = FakeClient()
    spec = {"policy": "threshold"}
    measure.compare(client, spec, make_batch(1), pairs=2, budget_s=60, on_progress=lambda *_: None)
    assert client.policies[::2] == [dict(PLAIN), spec, spec, dict(PLAIN)]


def test_speed_up_is_the_median_of_the_pairs():
    comparison = Comparison([block(10), block(20), block(10)], [block(20), block(22), block(15)])
    assert comparison.speed_up == comparison.cpu_speed_up == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("pairs", "elapsed", "another"), [(1, 100, True), (1, 101, False), (2, 66, True), (2, 67, False), (3, 75, True)]
)
def test_the_second_pair_may_take_twice_the_budget_and_later_ones_must_fit(pairs, elapsed, another):
    assert measure._worth_another(pairs, elapsed, budget_s=100) is another


def test_a_failed_request_ends_the_block_at_once_though_others_still_run():
    release = threading.Event()

    def slow() -> Response:
        release.wait(30)
        return Response("", 1, "stop")

    def fails() -> Response:
        raise RolloutError("gone")

    started = time.monotonic()
    try:
        with pytest.raises(RolloutError, match="gone"):
            measure.send_all([slow, fails])
        assert time.monotonic() - started < 10
    finally:
        release.set()
