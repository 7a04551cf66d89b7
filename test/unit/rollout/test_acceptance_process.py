"""Chance in the simulator: the same for every policy, with the means that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sglang_er.rollout import acceptance_process
from sglang_er.rollout.acceptance_process import Acceptance, Luck, parse_alpha, parse_change, uniforms


def test_a_uniform_depends_on_seed_request_and_position_alone():
    requests, positions = np.asarray([0, 0, 1, 7]), np.asarray([0, 1, 0, 5])
    together = uniforms(3, requests, positions)
    assert together[3] == uniforms(3, np.asarray([7]), np.asarray([5]))[0]
    assert len({*together.tolist(), *uniforms(4, requests, positions).tolist()}) == 8


def test_uniforms_are_even_and_not_correlated_along_a_response():
    many = uniforms(0, np.zeros(100_000, dtype=np.int64), np.arange(100_000))
    assert many.min() >= 0 and many.max() < 1
    counts = np.histogram(many, bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi square, 19 degrees of freedom: .1 %
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.012


def test_runs_count_accepted_drafts_one_after_the_other():
    luck = Luck(Acceptance(0.7, concentration=0), [2000], 5, seed=1)
    chance = uniforms(1, np.zeros(2000, dtype=np.int64), np.arange(2000))
    for start in range(1990):
        expected = 0
        while expected < 5 and chance[start + expected] < 0.7:
            expected += 1
        assert luck.runs[0][start] == expected


def test_the_mean_is_that_of_alpha_and_all_are_alike_without_spread():
    luck = Luck(Acceptance(0.9, concentration=20), [50] * 4000, 1, seed=0)
    of_request = luck.alphas[0][luck.start]
    assert of_request.mean() == pytest.approx(0.9, abs=0.004)
    assert of_request.std() == pytest.approx((0.9 * 0.1 / 21) ** 0.5, rel=0.05)
    assert luck.runs[0].mean() == pytest.approx(0.9, abs=0.005)
    assert set(Luck(Acceptance(0.9, 0), [5, 5], 1, 0).alphas[0]) == {0.9}
    assert Luck(Acceptance(1.0), [40], 4, 0).runs[0][:36].min() == 4


def test_acceptance_falls_with_the_position_and_the_offset_as_asked():
    faded = Luck(Acceptance(0.9, 0, decay=0.2), [2001], 1, 0).alphas[0]
    assert faded[0] == 0.9 and faded[2000] == pytest.approx(0.9 * 0.64)
    luck = Luck(Acceptance(1.0, offset_decay=0.5), [200_000], 2, 0)
    assert (luck.runs[0] >= 1).mean() > 0.9999
    assert (luck.runs[0] == 2).mean() == pytest.approx(0.5, abs=0.01)


def test_a_change_keeps_the_order_of_the_requests():
    before, after = Luck(Acceptance(0.9, change=(0.5, 0.5)), [1] * 500, 1, 0).alphas
    assert after.mean() == pytest.approx(0.5, abs=0.02)
    assert (np.argsort(before) == np.argsort(after)).all()


def test_alphas_of_a_file_are_dealt_out_in_turn(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps([0.5, 1]))
    assert parse_alpha(str(tmp_path / "a.json")) == (0.5, 1.0)
    assert Luck(Acceptance((0.5, 1.0)), [1, 1, 1], 1, 0).alphas[0].tolist() == [0.5, 1.0, 0.5]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: parse_alpha("none.json"), "--alpha none.json: neither a number nor a JSON file"),
        (lambda: Acceptance(1.5), "--alpha must be between 0 and 1"),
        (lambda: Acceptance(0.5, -1), "--alpha-concentration must be at least 0"),
        (lambda: Acceptance(0.5, decay=1.0), "--alpha-decay must be at least 0 and below 1"),
        (lambda: parse_change("0.5"), "--alpha-change 0.5: must be ALPHA@FRACTION"),
        (lambda: Acceptance(0.5, change=(0.5, 2)), "--alpha-change must be"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(make, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_file_without_a_list_of_numbers_is_refused(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"alpha": 1}')
    with pytest.raises(ValueError, match="must be a JSON list of numbers"):
        acceptance_process.parse_alpha(str(tmp_path / "a.json"))
