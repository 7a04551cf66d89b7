"""Settings, the judgement of the fixed-policy test, the timing's sums, and the report's page."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from grpo import report, timing
from grpo.fixed_policy import STATISTICS, first_difference, judged
from grpo.rollout import Rollout
from grpo.run import draw_prompts
from grpo.settings import ARMS, Settings
from grpo.trainer import MICRO_BATCH_TOKENS, micro_batches

MACHINE = {"cpu": "a CPU", "cores": 2, "load_before": [0.1, 0.1, 0.1], "load_after": [1.0, 1.0, 1.0]}
WHERE = {"machine": MACHINE, "date": "2026-01-01", "command": "make bench-training", "commit": "abc"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arm": "none"}, "unknown arm 'none': choose one of plain, speculation, frozen"),
        ({"client": "grpc"}, "unknown client"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_a_mistake_in_the_settings_is_one_clear_line(changes, said):
    with pytest.raises(ValueError, match=said):
        Settings(**changes)


def test_arms_see_the_same_prompts_and_steps_see_others():
    plain, drafted = (draw_prompts(Settings(arm=arm), 3) for arm in ("plain", "speculation"))
    assert plain == drafted
    assert draw_prompts(Settings(), 4) != plain
    assert draw_prompts(Settings(seed=1), 3) != plain


def rollout(prompt: int, length: int) -> Rollout:
    return Rollout((1,) * prompt, (2,) * length, (-1.0,) * length, 0.0, True)


def test_micro_batches_hold_every_rollout_once_and_stay_within_their_size():
    rollouts = [rollout(20, length) for length in (700, 30, 7000, 31, 900, 29, 1)]
    groups = list(micro_batches(rollouts, range(len(rollouts))))
    assert sorted(index for group in groups for index in group) == list(range(len(rollouts)))
    for group in groups:
        width = max(20 + len(rollouts[index].ids) for index in group)
        assert len(group) == 1 or len(group) * width <= MICRO_BATCH_TOKENS
    assert list(micro_batches(rollouts, [])) == []


def test_the_first_difference_may_be_the_end():
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2
    assert first_difference([5], [1]) == 0


def test_the_judgement_takes_all_comparisons_together_and_each_mutant_by_itself():
    good = dict.fromkeys(STATISTICS, 0.2)
    # .004 alone would be rejected at .01; among eight it is not.
    found = judged({"a": {**good, "reward": 0.004}, "b": good}, {"broken": {**good, "length": 0.0001}, "weak": good})
    assert found["passes"]
    assert found["adjusted_p"]["a: reward"] == pytest.approx(0.032)
    assert found["broken_rejected"] == {"broken": True, "weak": False}
    assert not judged({"a": {**good, "reward": 0.0001}}, {})["passes"]


def block(seconds: float, tokens: int = 100, **changes: object) -> dict[str, object]:
    return {"seconds": seconds, "requantize_seconds": 0.0, "tokens": tokens, "accept_length": None, **changes}


def test_a_step_is_its_mean_block_training_transfer_and_requantization():
    drafted = [block(6.0, accept_length=3.0, requantize_seconds=1.0), block(8.0, accept_length=3.0)]
    records = [
        {
            "blocks": {"plain": [block(9.0), block(11.0)], "speculation": drafted},
            "train_seconds": 1.0,
            "sync_seconds": 1.0,
            "expand_seconds": 30.0,
        }
    ]
    found = timing.summarize(records)
    assert found["ratio"]["rollout seconds"]["value"] == pytest.approx(0.7)
    # (7 + 1 + 2) / (10 + 2)
    assert found["ratio"]["step seconds"]["value"] == pytest.approx(10 / 12)
    assert found["ratio"]["seconds per token"]["low"] <= 0.7 <= found["ratio"]["seconds per token"]["high"]
    assert found["accept_length"] == 3.0


def write_runs(out, steps: int = 6) -> None:
    for arm in ARMS:
        for seed in range(2):
            folder = out / "runs" / f"{arm}_{seed}"
            folder.mkdir(parents=True)
            (folder / "settings.json").write_text(json.dumps(asdict(Settings(arm=arm, seed=seed))))
            fall = 0.1 if arm == "frozen" else 0.0
            lines = [
                {
                    "step": step,
                    "reward": 0.4 + 0.05 * step + 0.01 * (step % 2) * seed,
                    "entropy": 0.4,
                    "kl": 1e-5,
                    "length": 60.0,
                    "accept_length": None if arm == "plain" else 4.9 - fall * step + 0.01 * (step % 3),
                    "rollout_seconds": 2.0,
                    "train_seconds": 3.0,
                    "sync_seconds": 0.1,
                }
                for step in range(steps)
            ]
            (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_report_shows_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    write_runs(tmp_path)
    (tmp_path / "runs.json").write_text(json.dumps(WHERE))
    good = dict.fromkeys(STATISTICS, 0.2)
    side = {"rollouts": 4096, "alpha": 0.9}
    test = judged({"checkpoint_010": good, "stale twin": good}, {"accept_all": dict.fromkeys(STATISTICS, 0.0001)})
    test["sides"] = {"checkpoint_010": {"speculation": side}, "stale twin, right verifier": side}
    (tmp_path / "fixed_policy.json").write_text(json.dumps({**WHERE, **test}))
    report.write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "passes at family-wise 1%" in text
    assert "accept_all<td>rejected" in text
    assert "a CPU, 2 cores" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    summary = json.loads((tmp_path / "study.json").read_text())
    assert summary["slopes_per_step"]["frozen"]["accept_length"]["high"] < 0
    assert set(summary["first_and_last_five_steps"]["plain"]) >= {"reward", "entropy", "length"}
    assert "accept_length" not in summary["slopes_per_step"]["plain"]


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        report.write(tmp_path)
