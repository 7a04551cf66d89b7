"""Draft lengths of the policies that need no measurement, and the bounds that every policy keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_er.config import RolloutConfig, resolve
from sglang_er.policy import GoodputPolicy, Policy, StepOutcome, StepState, make_policy


def state(batch_size: int = 1, gamma_limit: int = 16, speculative_rows: int | None = None) -> StepState:
    rows = batch_size if speculative_rows is None else speculative_rows
    return StepState(batch_size, context_tokens=100, gamma_limit=gamma_limit, speculative_rows=rows)


def policy_of(**flags: object) -> Policy:
    return make_policy(resolve(flags=flags))


def test_fixed_always_gives_its_gamma():
    policy = policy_of(policy="fixed", gamma=5)
    assert [policy.choose(state(batch_size)) for batch_size in (1, 7, 512)] == [5, 5, 5]


@pytest.mark.parametrize(("batch_size", "gamma"), [(1, 5), (2, 5), (3, 3), (8, 3), (9, 1), (32, 1), (33, 0), (4096, 0)])
def test_threshold_takes_the_first_bin_that_holds_the_batch(batch_size: int, gamma: int):
    assert policy_of(policy="threshold", thresholds="2:5,8:3,32:1").choose(state(batch_size)) == gamma


def test_threshold_may_draft_nothing_in_the_middle():
    policy = policy_of(policy="threshold", thresholds="2:0,8:4")
    assert [policy.choose(state(batch_size)) for batch_size in (1, 3, 9)] == [0, 4, 0]


def test_default_thresholds_never_rise_with_the_batch():
    policy = make_policy(RolloutConfig(policy="threshold"))
    gammas = [policy.choose(state(batch_size)) for batch_size in range(1, 65)]
    assert gammas[0] > 0
    assert gammas[-1] == 0
    assert gammas == sorted(gammas, reverse=True)


def test_cycle_follows_its_schedule_and_starts_anew():
    policy = policy_of(policy="cycle", gamma_schedule="0,3,1")
    assert [policy.choose(state()) for _ in range(7)] == [0, 3, 1, 0, 3, 1, 0]
    assert policy.describe()["steps"] == 7


@given(
    st.sampled_from(
        [
            {"policy": "fixed", "gamma": 7},
            {"policy": "threshold", "thresholds": "4:7,64:2"},
            {"policy": "cycle", "gamma_schedule": "7,0,3"},
        ]
    ),
    st.lists(st.tuples(st.integers(1, 128), st.integers(-2, 16), st.integers(0, 4)), min_size=1),
)
def test_every_policy_stays_within_what_the_step_can_hold(flags: dict[str, object], steps: list[tuple[int, int, int]]):
    policy = policy_of(**flags)
    for batch_size, bound, rows in steps:
        gamma = policy.choose(state(batch_size, bound, min(rows, batch_size)))
        assert 0 <= gamma <= max(bound, 0)
        if rows == 0:
            assert gamma == 0  # a draft that nobody may use costs a draft pass


@pytest.mark.parametrize("name", ["fixed", "threshold", "cycle"])
def test_every_policy_describes_itself_and_takes_outcomes(name: str):
    policy = policy_of(policy=name, gamma_schedule="2,2")
    before = policy.choose(state())
    policy.observe(StepOutcome(state(), gamma=before, accept_lens=[1], seconds=0.01))
    assert policy.describe()["policy"] == name
    assert policy.choose(state()) == before


def test_goodput_keeps_what_it_learnt_when_it_is_chosen_again():
    learnt = GoodputPolicy(7)
    learnt.observe(StepOutcome(state(), gamma=0, accept_lens=[1], seconds=0.01))
    chosen = make_policy(resolve(flags={"policy": "goodput", "objective": "makespan"}), learnt)
    assert chosen is learnt and chosen.objective == "makespan" and chosen.choose(state()) > 0
    assert policy_of(policy="goodput").choose(state()) == 0  # a fresh one knows no costs
    assert make_policy(resolve(flags={"policy": "fixed"}), learnt).describe()["policy"] == "fixed"


def test_a_policy_that_does_not_exist_is_refused():
    class Settings:
        policy, gamma, thresholds, gamma_schedule, objective, gamma_max = "guess", 3, (), None, "tokens", 7

    with pytest.raises(ValueError, match="no policy 'guess'"):
        make_policy(Settings())


def test_policies_need_neither_torch_nor_sglang():
    code = "import sys, sglang_er.policy; sys.exit(any(m in sys.modules for m in ('torch', 'sglang', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
