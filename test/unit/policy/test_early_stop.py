"""A draft ends where the twin's confidence says that the rest will not pay, and nowhere else."""

from __future__ import annotations

import math
import random

import pytest

from sglang_er.policy import StepOutcome, StepState
from sglang_er.policy.cost_features import Step
from sglang_er.policy.early_stop import BANDS, EarlyStop, Plan
from sglang_er.policy.goodput import GoodputPolicy

# In plain steps: a drafted token .3, a verify pass 1 and .03 a token.
SECONDS = (1.0, *(0.3 * gamma + 1.0 + 0.03 * gamma for gamma in range(1, 9)))
ALPHAS = (0.93,) * 8
SURE, UNSURE = 0.9999, 0.6
KEPT = {SURE: 0.99, UNSURE: 0.7}


def rate(alpha: float, gamma: int) -> float:
    return sum(alpha**i for i in range(gamma + 1)) / SECONDS[gamma]


PLAN = Plan(1, SECONDS, ALPHAS, max(rate(0.93, gamma) for gamma in range(9)))


def taught(sure: float = KEPT[SURE], unsure: float = KEPT[UNSURE]) -> EarlyStop:
    """One that has seen 2000 drafts of each kind, alone in their chains."""
    stop, rng = EarlyStop(), random.Random(1)
    for _ in range(2000):
        for confidence, alpha in ((SURE, sure), (UNSURE, unsure)):
            stop.observe([[confidence]], [1 + (rng.random() < alpha)])
    return stop


def length(stop: EarlyStop, confidences: list[float], plan: Plan = PLAN) -> int:
    stop.begin(plan)
    drafted = 0
    for confidence in confidences[: len(plan.seconds) - 1]:
        drafted += 1
        if not stop.goes_on([confidence]):
            break
    return drafted


def test_sure_drafts_go_to_the_limit_and_unsure_ones_end():
    stop = taught()
    assert length(stop, [SURE] * 8) == 8
    assert length(stop, [UNSURE] * 8) < 4
    assert length(stop, [SURE, SURE, UNSURE, UNSURE, UNSURE, UNSURE, UNSURE, UNSURE]) in (3, 4, 5)
    assert stop.stopped == 2


def test_nothing_learnt_means_no_opinion():
    """Without evidence every confidence means the average: the length is about that of the best fixed one."""
    best = max(range(9), key=lambda gamma: rate(0.93, gamma))
    assert abs(length(EarlyStop(), [UNSURE] * 8) - best) <= 3
    assert length(EarlyStop(), [SURE] * 8) == length(EarlyStop(), [UNSURE] * 8)


def test_dearer_drafts_end_earlier():
    stop, lengths = taught(unsure=0.85), []
    for factor in (1.0, 1.5, 2.5, 4.0):
        seconds = tuple(value + factor * 0.3 * gamma for gamma, value in enumerate(SECONDS))
        best = max(sum(0.93**i for i in range(gamma + 1)) / seconds[gamma] for gamma in range(9))
        lengths.append(length(stop, [UNSURE, SURE] * 4, Plan(1, seconds, ALPHAS, best)))
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_many_rows_follow_the_sum_of_their_chains():
    stop = taught()
    sixteen = Plan(16, tuple(2 * value for value in SECONDS), ALPHAS, 16 * PLAN.rate / 2)
    for sure, on in ((16, True), (0, False)):
        stop.begin(sixteen)
        values = [SURE] * sure + [UNSURE] * (16 - sure)
        going = [stop.goes_on(values) for _ in range(3)]
        assert going[-1] is on


def test_it_beats_the_best_fixed_length_where_confidence_tells():
    """Chains of a language with easy and hard stretches; both sides have the same chains and costs."""
    rng = random.Random(3)
    stop = EarlyStop()

    def chain() -> list[tuple[float, bool]]:
        found, sure = [], rng.random() < 0.75
        for _ in range(8):
            kind = SURE if sure else UNSURE
            found.append((kind, rng.random() < KEPT[kind]))
            sure = rng.random() < (0.85 if sure else 0.45)
        return found

    def tokens(drafts: list[tuple[float, bool]]) -> int:
        return 1 + next((i for i, (_, kept) in enumerate(drafts) if not kept), len(drafts))

    chains = [chain() for _ in range(6000)]
    fixed = max(sum(tokens(drafts[:gamma]) for drafts in chains) / (len(chains) * SECONDS[gamma]) for gamma in range(9))
    plan = Plan(1, SECONDS, ALPHAS, fixed)
    made = spent = 0.0
    for number, drafts in enumerate(chains):
        drafted = length(stop, [confidence for confidence, _ in drafts], plan)
        count = tokens(drafts[:drafted])
        stop.observe([[confidence] for confidence, _ in drafts[:drafted]], [count])
        if number >= 500:
            made, spent = made + count, spent + SECONDS[drafted]
    assert made / spent > 1.02 * fixed
    assert 1.0 < stop.pace() < 1.2


def test_only_verified_drafts_count():
    stop = EarlyStop()
    stop.observe([[SURE], [UNSURE], [UNSURE]], [1])  # the first was rejected, the others say nothing
    assert stop.describe()["evidence"] == pytest.approx([0.0] * len(BANDS) + [1.0])
    assert stop.acceptance(SURE) < stop.acceptance(UNSURE)


def test_counts_that_cannot_be_are_ignored_and_counted():
    stop = EarlyStop()
    for confidences, lens in (([[SURE]], [3]), ([[SURE]], [0]), ([[SURE, SURE]], [1])):
        stop.observe(confidences, lens)
    assert stop.ignored == 3 and stop.describe()["evidence"] == [0.0] * (len(BANDS) + 1)


def test_drift_is_followed():
    stop, rng = taught(), random.Random(4)
    for _ in range(20_000):
        stop.observe([[UNSURE]], [1 + (rng.random() < 0.98)])
    assert stop.acceptance(UNSURE) == pytest.approx(0.98, abs=0.02)


def goodput(early: bool, objective: str = "tokens") -> GoodputPolicy:
    policy = GoodputPolicy(8, objective)  # type: ignore[arg-type]
    policy.stops_early = early
    step = Step(1, 100)
    for _ in range(60):
        policy.cost.observe_plain(step, 0.01)
        for gamma in (1, 4, 8):
            policy.cost.observe_speculative(step, step, gamma, 0.01 + 0.003 * gamma, 0.0027 * gamma)
    return policy


def state(rows: int = 1, limit: int = 8) -> StepState:
    return StepState(rows, 100 * rows, limit, rows)


def test_the_policy_lets_a_draft_go_beyond_the_length_it_chose():
    policy = goodput(early=True)
    gamma = policy.choose(state())
    assert 0 < gamma <= policy.reach == 8
    assert policy.choose(state(limit=3)) <= policy.reach == 3


def test_fixed_lengths_where_nobody_asks():
    """Not configured, many rows, another objective: the draft is as long as it was chosen, however sure the twin is."""
    for policy, rows in ((goodput(early=False), 1), (goodput(True, "makespan"), 1), (goodput(True), 17)):
        assert policy.reach == 0
        gamma = policy.choose(state(rows))
        assert policy.reach == gamma
        assert policy.goes_on([UNSURE] * rows) is True


def test_a_plain_step_has_no_reach():
    policy = goodput(early=True)
    policy.choose(state())
    assert policy.choose(state(limit=0)) == policy.reach == 0


def test_outcomes_teach_the_policy():
    policy = goodput(early=True)
    policy.observe(StepOutcome(state(), 2, [2], 0.02, 0.006, [[SURE], [UNSURE]]))
    described = policy.describe()["early_stop"]
    assert sum(described["evidence"]) == pytest.approx(2.0)
    assert math.isfinite(described["pace"])
    assert goodput(early=False).describe()["early_stop"] is None
