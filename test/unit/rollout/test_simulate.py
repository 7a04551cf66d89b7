"""The event loop: every token is made once, time is the costs' sum, and a policy sees what an engine would show it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from sglang_er.policy import FixedPolicy
from sglang_er.rollout.acceptance_process import Acceptance, Luck
from sglang_er.rollout.arrivals import Lengths, make_work, parse_arrivals, parse_lengths
from sglang_er.rollout.costs import StepTable
from sglang_er.rollout.simulate import Engine, Run, simulate

QUIET = Engine(max_running=64, noise=0.0, outliers=0.0, late=0)


class Simple:
    """A plain step takes 1 s, a drafted token a tenth, a verify 1 s and a tenth for every draft and request."""

    name, gamma_max, batch_max = "simple", 8, 64

    def plain(self, batch, context):
        return 1.0

    def draft(self, batch, context):
        return 0.1

    def verify(self, batch, context, gamma):
        return 1.0 + 0.1 * gamma * batch


class Spy:
    """Another policy's choices, and everything it was told."""

    def __init__(self, gamma=3):
        self.gamma, self.states, self.outcomes = gamma, [], []

    def choose(self, state):
        self.states.append(state)
        return self.gamma

    def observe(self, outcome):
        self.outcomes.append(outcome)

    def weights_changed(self):
        pass

    def describe(self):
        return {}


def given(*lengths: int) -> Lengths:
    return Lengths("given", lambda count, seed: list(lengths), [list(lengths)])


def replay(policy, lengths=None, alpha=0.8, engine=QUIET, arrivals="closed", count=None, seed=0, **acceptance) -> Run:
    work = make_work(lengths or given(30, 5, 12), count, 100, parse_arrivals(arrivals, 3.0, 10), seed)
    table = StepTable(Simple(), 8)
    luck = Luck(Acceptance(alpha, **acceptance), work.lengths, 8, seed)
    change = acceptance.get("change")
    return simulate(work, luck, table, policy, engine, seed, change_after=change and change[1])


def test_plain_decode_takes_as_many_steps_as_the_longest_response():
    run = replay(FixedPolicy(0))
    assert len(run.seconds) == 30 and run.makespan == pytest.approx(30.0)
    assert sum(run.committed) == 47
    assert sorted(run.latencies) == pytest.approx([5.0, 12.0, 30.0])
    assert run.sizes == [3] * 5 + [2] * 7 + [1] * 18


def test_the_next_wave_comes_when_few_are_left():
    run = replay(FixedPolicy(0), given(30, 5, 12, 4, 20, 9), arrivals="waves:2,1", count=3)
    # 5 and 12 end; at one left the second wave joins the 30: 4, 9, 20 end 4, 9, 20 steps later, the 30 between them.
    assert run.sizes == [3] * 5 + [2] * 7 + [4] * 4 + [3] * 5 + [2] * 9 + [1] * 2
    assert sorted(run.latencies) == pytest.approx([4.0, 5.0, 9.0, 12.0, 20.0, 30.0])


def test_a_wave_that_waits_for_the_end_of_the_one_before_still_comes():
    run = replay(FixedPolicy(0), given(3, 2, 4, 1), arrivals="waves:2,0", count=2)
    assert run.sizes == [2, 2, 1, 2, 1, 1, 1] and run.makespan == pytest.approx(7.0)


def test_time_is_the_sum_of_the_costs_of_the_steps():
    run = replay(FixedPolicy(3), alpha=1.0, concentration=0)
    # Four tokens a step: 5 ends in the second, 12 in the third, 30 in the eighth, whose draft is one token long.
    assert run.sizes == [3, 3, 2, 1, 1, 1, 1, 1]
    assert run.gammas == [3] * 7 + [1]
    assert run.seconds == pytest.approx([0.3 + 1 + 0.3 * size for size in run.sizes[:7]] + [0.1 + 1 + 0.1])
    assert run.makespan == pytest.approx(sum(run.seconds))
    assert [a + s for a, s in zip(run.started, run.seconds)][:-1] == pytest.approx(run.started[1:])


@pytest.mark.parametrize("arrivals", ["closed", "open:0.5", "turns:3"])
@pytest.mark.parametrize("gamma", [0, 1, 5])
@pytest.mark.parametrize("running", [2, 64])
def test_every_token_is_made_once(arrivals: str, gamma: int, running: int):
    spy, lengths = Spy(gamma), parse_lengths("lognormal:20,1,80")
    engine = Engine(running, prefill_rate=1000.0)
    run = replay(spy, lengths, engine=engine, arrivals=arrivals, count=10)
    work = make_work(lengths, 10, 100, parse_arrivals(arrivals, 3.0, 10), 0)
    made = dict.fromkeys(range(len(work.lengths)), 0)
    for outcome in spy.outcomes:
        assert len(outcome.accept_lens) == outcome.state.batch_size <= running
        for request, tokens in zip(outcome.state.requests, outcome.accept_lens):
            assert 1 <= tokens <= outcome.gamma + 1
            made[request] += tokens
    assert list(made.values()) == work.lengths
    assert sum(run.committed) == sum(work.lengths) and len(run.latencies) == len(work.lengths)
    assert run.prefill == pytest.approx(sum(work.new_tokens) / 1000.0)


def test_the_state_is_what_an_engine_would_tell():
    spy = Spy(3)
    replay(spy)
    left, context = {0: 30, 1: 5, 2: 12}, {0: 100, 1: 100, 2: 100}
    outcomes = iter(spy.outcomes)
    for state in spy.states:
        assert state.batch_size == state.speculative_rows == len(state.requests)
        assert state.context_tokens == sum(context[r] for r in state.requests)
        assert state.gamma_limit == min(8, max(left[r] for r in state.requests) - 1)
        for request, tokens in zip(state.requests, next(outcomes).accept_lens):
            left[request] -= tokens
            context[request] += tokens


def test_two_policies_that_draft_alike_see_the_same_luck():
    fixed, spy = replay(FixedPolicy(4)), replay(Spy(4))
    assert fixed == spy


def test_a_token_is_accepted_or_not_whatever_was_drafted_before():
    """At positions where both policies begin a draft, the shorter draft accepts what the longer one does."""

    def accepted(gamma):
        spy, at, found = Spy(gamma), 0, {}
        replay(spy, given(2000))
        for outcome in spy.outcomes:
            found[at] = outcome.accept_lens[0]
            at += outcome.accept_lens[0]
        return found

    short, long = accepted(2), accepted(6)
    common = [at for at in short if at in long and at < 1990]
    assert len(common) > 100
    assert all(short[at] == min(3, long[at]) for at in common)


def test_outcomes_come_late_in_order_and_all():
    engine = Engine(64, late=2, noise=0.0, outliers=0.0)
    spy = Spy(1)
    seen = []
    spy.choose = lambda state: seen.append(len(spy.outcomes)) or 1
    run = replay(spy, engine=engine)
    assert seen[:5] == [0, 0, 0, 1, 2]
    assert [outcome.gamma for outcome in spy.outcomes] == run.gammas


def test_the_policy_hears_noise_and_the_truth_has_none():
    engine = Engine(64, late=0, noise=0.02, outliers=0.01)
    spy = Spy(3)
    run = replay(spy, given(4000), engine=engine)
    ratios = [outcome.seconds / seconds for outcome, seconds in zip(spy.outcomes, run.seconds)]
    assert len(set(run.seconds[:-1])) == 1  # all but the end
    usual = [ratio for ratio in ratios if ratio < 2]
    assert 0.005 <= 1 - len(usual) / len(ratios) <= 0.02
    assert sum(usual) / len(usual) == pytest.approx(1.0, abs=0.003)
    assert 0.010 < (sum((ratio - 1) ** 2 for ratio in usual) / len(usual)) ** 0.5 < 0.02
    drafts = [outcome.draft_seconds / 0.3 for outcome in spy.outcomes if outcome.gamma == 3]
    assert 0.015 < (sum((d - 1) ** 2 for d in drafts if d < 2) / len(drafts)) ** 0.5 < 0.025


def test_a_step_behind_a_prefill_tells_no_time():
    spy = Spy(2)
    run = replay(spy, engine=Engine(64, prefill_rate=100.0, late=0), arrivals="open:0.2")
    hidden = [math.isnan(outcome.seconds) for outcome in spy.outcomes]
    assert hidden[0] and sum(hidden) == 3
    assert run.prefill == pytest.approx(3.0) and run.makespan > run.busy  # idle between arrivals


def test_a_full_engine_makes_requests_wait():
    run = replay(FixedPolicy(0), given(10, 10, 10, 10), engine=Engine(2, noise=0.0))
    assert run.sizes == [2] * 20 and run.latencies == pytest.approx([10, 10, 20, 20])


def test_a_conversation_thinks_between_its_turns():
    spy = Spy(0)
    run = replay(spy, given(4, 6), arrivals="turns:2", count=1)
    work = make_work(given(4, 6), 1, 100, parse_arrivals("turns:2", 3.0, 10), 0)
    assert run.makespan == pytest.approx(4 + work.delay[0] + 6)
    assert run.latencies == pytest.approx([4, 6])
    # Like the engine, the loop does not ask for the last token of a response: there is nothing to choose.
    assert [state.context_tokens for state in spy.states[:4]] == [100, 101, 102, 114]


def test_acceptance_changes_when_its_share_of_the_tokens_is_made():
    run = replay(FixedPolicy(4), given(4000), alpha=1.0, concentration=0, change=(0.0, 0.5))
    before, after = [], []
    made = 0
    for tokens in run.committed:
        (before if made < 2000 else after).append(tokens)
        made += tokens
    assert set(before) == {5} and set(after) == {1}


def test_a_policy_that_raises_is_heard():
    class Broken(Spy):
        def observe(self, outcome):
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        replay(Broken())


def test_a_choice_beyond_the_limit_is_clipped_as_the_engine_clips_it():
    run = replay(Spy(99), given(40), alpha=1.0, concentration=0)
    assert run.gammas == [8, 8, 8, 8, 3]
    assert all(a < b for a, b in pairwise(run.started))


def test_the_draft_pass_is_timed_where_the_engine_can_and_something_was_drafted():
    spy = Spy(2)
    replay(spy)
    assert all(math.isnan(o.draft_seconds) == (o.gamma == 0) for o in spy.outcomes)
    assert any(o.gamma for o in spy.outcomes)
    hidden = Spy(2)
    replay(hidden, engine=Engine(64, split=False))
    assert all(math.isnan(o.draft_seconds) and o.seconds > 0 for o in hidden.outcomes)


def test_requests_have_names_in_small_batches_only():
    spy = Spy(0)
    replay(spy, given(*[3] * 16, 1))
    assert [len(state.requests) for state in spy.states] == [0, 16]
