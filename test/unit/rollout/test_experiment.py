"""Policies against each other: no draft length beats the oracle, and the paper's rule gains what the paper says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sglang_er.policy import StepState
from sglang_er.rollout import experiment, roofline, simulate_report, sweep
from sglang_er.rollout.acceptance_process import Acceptance
from sglang_er.rollout.arrivals import Arrivals, parse_arrivals, parse_lengths
from sglang_er.rollout.costs import StepTable
from sglang_er.rollout.experiment import Plan
from sglang_er.rollout.simulate import Engine, Truth
from sglang_er.rollout.simulated_policies import PolicyOptions, make

NAME = "a100-qwen2.5-7b"


def plan(**changes) -> Plan:
    first = Plan(
        table=StepTable(sweep.load(NAME), 15),
        lengths=parse_lengths("lognormal:200,1,2048"),
        requests=64,
        prompt=256,
        arrivals=Arrivals(),
        acceptance=Acceptance(0.95),
        engine=Engine(128),
        options=PolicyOptions(15, roofline=roofline.published_constants(NAME)),
        policies=[],
        seeds=4,
    )
    return replace(first, **changes)


@pytest.mark.parametrize("alpha", [0.5, 0.85, 0.95])
@pytest.mark.parametrize("arrivals", ["closed", "turns:2"])
def test_no_fixed_draft_length_beats_the_oracle(alpha: float, arrivals: str):
    gammas = [f"fixed:{gamma}" for gamma in (1, 2, 3, 5, 7, 11, 15)]
    asked = plan(policies=gammas, acceptance=Acceptance(alpha), arrivals=parse_arrivals(arrivals), requests=48)
    samples = experiment.run(asked)
    assert list(samples) == ["ar", *gammas, "oracle"]
    for name in ("ar", *gammas):
        saved = experiment.against(samples, "oracle", name).saved
        assert saved.mean > -0.01, f"{name} is faster than the oracle: {saved}"


@pytest.mark.parametrize("alpha", [0.95, 0.98])
def test_the_rule_of_the_paper_gains_what_the_paper_reports(alpha: float):
    """Closed batch of 128, lognormal lengths of its mean and cap, sigma 1: 19.6 % less rollout time in its table."""
    lengths = parse_lengths("lognormal:661,1,8192")
    samples = experiment.run(plan(policies=["paper"], acceptance=Acceptance(alpha), lengths=lengths, requests=128))
    assert 0.18 < experiment.against(samples, "paper", "ar").saved.mean < 0.32
    assert experiment.against(samples, "oracle", "paper").saved.mean > 0
    gammas = samples["paper"][0].steps
    assert set(gammas) <= set(range(8)) and gammas[0] > 0 and gammas[7] > 0


def test_the_ladder_of_the_paper_climbs_between_rollouts():
    options = PolicyOptions(15, roofline=roofline.published_constants(NAME))
    asked = plan(policies=["paper"], acceptance=Acceptance(0.995), options=options, rollouts=5, seeds=1)
    sample = experiment.run(asked)["paper"][0]
    assert len(sample.makespans) == 5
    assert {7, 9, 11} <= set(sample.steps)
    assert sample.described["gamma"] == 11


@pytest.mark.parametrize("alpha", [0.6, 0.95])
@pytest.mark.parametrize("arrivals", ["closed", "turns:3"])
def test_the_measuring_policy_is_near_the_oracle_and_not_slower_than_plain_decode(alpha: float, arrivals: str):
    asked = plan(
        policies=["goodput"], acceptance=Acceptance(alpha), arrivals=parse_arrivals(arrivals), requests=48, seeds=3
    )
    samples = experiment.run(replace(asked, options=replace(asked.options, seed_from=asked.table)))
    assert experiment.against(samples, "goodput", "oracle").saved.mean > -0.04
    assert experiment.against(samples, "goodput", "ar").saved.mean > -0.02


@pytest.mark.parametrize("error", [0.5, 2.0])
def test_a_start_up_that_timed_the_draft_pass_wrongly_is_corrected(error: float):
    """The first choice shows that the error was believed, the makespan that it was not for long."""
    table = StepTable(sweep.load(NAME), 15)
    options = [PolicyOptions(15, seed_from=table, seed_error=factor) for factor in (1.0, error)]
    first = [make("goodput", chosen, Truth()).choose(StepState(4, 2000, 15, 4)) for chosen in options]
    assert first[1] < first[0] if error > 1 else first[1] > first[0]
    samples = experiment.run(plan(policies=["goodput"], options=options[1], acceptance=Acceptance(0.9), requests=128))
    assert experiment.against(samples, "goodput", "oracle").saved.mean > -0.04


def test_all_policies_have_the_same_work_and_a_seed_can_be_repeated():
    once, again = experiment.run(plan(seeds=2)), experiment.run(plan(seeds=2))
    assert [sample.tokens for sample in once["ar"]] == [sample.tokens for sample in once["oracle"]]
    assert once == again
    assert once["ar"][0].makespan != once["ar"][1].makespan


def test_a_sample_counts_what_happened():
    sample = experiment.run(plan(policies=["fixed:3"], seeds=1))["fixed:3"][0]
    assert sum(sample.seconds.values()) == pytest.approx(sample.makespan)
    assert sum(steps for steps, _ in sample.by_batch.values()) == sample.steps.total()
    assert sample.by_batch[64][1] == 3 * sample.by_batch[64][0]
    assert 3.4 < sample.accepted / sample.drafting < 3.8
    assert sum(row.tokens_per_second for row in sample.timeline) * sample.makespan / 60 == pytest.approx(
        sample.tokens, rel=0.01
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nope", "--policy nope: must be one of ar, fixed:G"),
        ("fixed", "--policy fixed: must be one of"),
        ("fixed:16", "--policy fixed:16: the draft length must be between 0 and 15"),
        ("oracle:3", "--policy oracle:3: must be one of"),
        ("paper", "--paper-constants FILE"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_before_anything_runs(name: str, words: str):
    with pytest.raises(ValueError, match=words):
        experiment.check(plan(policies=[name], options=PolicyOptions(15)))


def test_a_policy_that_raises_is_heard(monkeypatch):
    def broken(self, state):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("sglang_er.policy.ThresholdPolicy.choose", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        experiment.run(plan(policies=["threshold"], seeds=1))


def test_the_report_has_a_row_for_every_policy_and_json_has_all_fields():
    asked = plan(policies=["fixed:3"], seeds=3)
    samples = experiment.run(asked)
    gains = simulate_report.gains_of(asked, 1024)
    text = simulate_report.text(asked, samples, gains)
    assert all(f"\n{name} " in text for name in ("ar", "fixed:3", "oracle"))
    content = json.loads(json.dumps(simulate_report.to_json(asked, samples, gains, {"command": "c"})))
    assert set(content) == {
        "command", "costs", "workload", "acceptance", "engine", "policies", "best_gamma"
    }  # fmt: skip
    found = content["policies"]["fixed:3"]
    assert set(found) == {
        "makespan_s", "busy_s", "tokens_per_s", "latency_s", "against", "accept_length", "gamma_histogram",
        "gamma_seconds", "gamma_by_batch", "tokens", "makespans_s", "described", "timeline",
    }  # fmt: skip
    assert set(found["against"]) == {"ar", "oracle"}
    saved = found["against"]["ar"]["saved"]
    assert saved["low"] < saved["mean"] < saved["high"]
    assert found["makespan_s"]["low"] < found["makespan_s"]["mean"] < found["makespan_s"]["high"]
    assert sum(found["gamma_histogram"].values()) == pytest.approx(1, abs=1e-4)
    assert len(found["timeline"]) == experiment.TIMELINE_ROWS
    assert content["best_gamma"]["break_even_batch"] > 8


def test_one_seed_has_no_interval():
    samples = experiment.run(plan(seeds=1))
    assert experiment.against(samples, "oracle", "ar").saved.low is None
    assert "±" not in simulate_report.text(plan(seeds=1), samples, None)
