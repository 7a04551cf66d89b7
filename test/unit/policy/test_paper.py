"""The paper's rule: its roofline, a switch that latches, and a ladder that moves after two rollouts."""

from __future__ import annotations

import pytest

from sglang_er.policy.base import StepOutcome, StepState
from sglang_er.policy.paper import PaperPolicy, Roofline

# Qwen2.5-7B on an A100, as published.
CONSTANTS = {
    "W_t": 15230974976.0, "W_d": 5443042304.0, "C_dense": 14140571648, "C_attn": 401408, "BW_eff": 1617462633773.974,
    "kappa_eff": 26205, "F_eff": 233514e9, "eta_d": 1.334, "c_T": 39.0, "c_D": 69.0, "c_V": 152.3,
}  # fmt: skip
ROOFLINE = Roofline.from_json(CONSTANTS)


def state(batch: int, limit: int = 15) -> StepState:
    return StepState(batch, batch * 2048, limit, batch)


def drafted(policy: PaperPolicy, gamma: int, accepted: float, steps: int = 100) -> None:
    whole = round(accepted * steps * gamma)
    counts = [whole // steps + (i < whole % steps) for i in range(steps)]
    for count in counts:
        policy.observe(StepOutcome(state(1), gamma, [1 + count], 0.01))


@pytest.mark.parametrize(("gamma", "length", "batch"), [(5, 5.0, 31), (7, 7.0, 34), (9, 9.0, 36), (11, 10.0, 29)])
def test_the_roofline_ends_where_the_published_one_ends(gamma: int, length: float, batch: int):
    gains = [size for size in range(1, 129) if ROOFLINE.speed_up(size, 2048, gamma, length) >= 1.05]
    assert gains == list(range(1, batch + 1))


def test_the_switch_waits_for_the_ramp_latches_and_never_goes_back():
    policy = PaperPolicy(ROOFLINE)
    assert policy.choose(state(4)) == 0  # a batch that was never large is not decided about
    assert policy.choose(state(128)) == 0
    assert policy.choose(state(35)) == 0  # predicted below 1.05
    assert policy.choose(state(34)) == 0  # switched on; this step is still plain
    assert policy.choose(state(34)) == 7
    assert policy.choose(state(128)) == 7
    assert policy.choose(state(128, limit=3)) == 3
    policy.weights_changed()
    assert policy.choose(state(34)) == 0


def test_a_rollout_takes_its_accept_length_from_the_one_before():
    policy = PaperPolicy(ROOFLINE)
    drafted(policy, 7, 3 / 7)
    policy.weights_changed()
    assert policy.describe()["accept_length"] == 4.0
    for batch in (128, 16, 1, 1):
        assert policy.choose(state(batch)) == 0  # never predicted to gain again, so never measured again
    policy.weights_changed()
    assert policy.describe()["accept_length"] == 4.0


def test_the_ladder_moves_one_rung_after_two_rollouts_in_a_row():
    policy = PaperPolicy(ROOFLINE, gamma=5)
    gammas = []
    for rate in (0.95, 0.95, 0.95, 0.90, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95, 0.80, 0.80):
        gamma = policy.describe()["gamma"]
        drafted(policy, gamma, rate)
        policy.weights_changed()
        gammas.append(policy.describe()["gamma"])
    assert gammas == [5, 7, 7, 7, 7, 9, 9, 11, 11, 11, 11, 9]


def test_a_rollout_without_drafts_moves_nothing():
    policy = PaperPolicy(ROOFLINE)
    drafted(policy, 7, 0.99)
    policy.weights_changed()
    policy.observe(StepOutcome(state(1), 0, [1], 0.01))
    policy.weights_changed()
    drafted(policy, 7, 0.99)
    policy.weights_changed()
    assert policy.describe()["gamma"] == 9


@pytest.mark.parametrize(("name", "value"), [("W_t", None), ("c_V", "much"), ("eta_d", -1), ("BW_eff", 0)])
def test_bad_constants_are_named(name: str, value: object):
    with pytest.raises(ValueError, match=name) as caught:
        Roofline.from_json({**CONSTANTS, name: value})
    assert "\n" not in str(caught.value)


def test_the_first_rung_is_on_the_ladder():
    with pytest.raises(ValueError, match="draft length 6 must be a rung"):
        PaperPolicy(ROOFLINE, gamma=6)
