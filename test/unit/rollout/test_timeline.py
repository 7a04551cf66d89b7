"""Timelines: differences between looks, a gauge that counts failures out, and a picture where one can be drawn."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from sglang_er.rollout import timeline
from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.timeline import Gauge, Row, Sampler


def state(plain: int, drafting: int, tokens: int):
    return {
        "steps": {
            "steps_by_gamma": {"0": plain, "4": drafting},
            "request_steps": plain + drafting,
            "committed_tokens": tokens,
            "accepted_drafts": 0,
            "speculating_request_steps": drafting,
        }
    }


def test_rows_are_differences_and_a_short_block_has_one():
    looks = iter([state(5, 5, 100), state(6, 8, 120)])
    with Sampler(lambda: next(looks), Gauge(), interval=60.0) as sampler:
        time.sleep(0.05)
    (row,) = sampler.rows()
    assert row.gamma == 3.0 and row.active == 0
    assert row.tokens_per_second == pytest.approx(20 / row.seconds, rel=0.5)


def test_a_look_that_fails_is_left_out():
    def fails():
        raise RolloutError("gone")

    with Sampler(fails, Gauge(), interval=0.01) as sampler:
        time.sleep(0.03)
    assert sampler.rows() == []


def test_the_gauge_counts_a_request_until_it_ends_however_it_ends():
    gauge = Gauge()
    assert gauge.around(lambda: gauge.active)() == 1 and gauge.active == 0

    def fails():
        raise RolloutError("refused")

    with pytest.raises(RolloutError):
        gauge.around(fails)()
    assert gauge.active == 0


def test_without_matplotlib_one_line_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--png needs matplotlib") as caught:
        timeline.require_plotting()
    assert "\n" not in str(caught.value)


def test_the_picture_is_a_png(tmp_path: Path):
    pytest.importorskip("matplotlib")
    rows = [Row(0.5, 4, None, 10.0), Row(1.0, 2, 3.0, 20.0)]
    timeline.draw(tmp_path / "x.png", {"speculative": rows, "plain": []}, "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
