"""Candidates take turns; a figure is the median or the fastest turn; rotation visits other memory."""

from __future__ import annotations

import time
from functools import partial
from itertools import count

import pytest

from sglang_er.bench import stream
from sglang_er.bench.timing import Timing, rotate


def test_candidates_take_turns_and_the_first_turn_is_not_counted():
    order: list[str] = []

    def run(name: str, slow_once: list[float]) -> None:
        order.append(name)
        time.sleep(slow_once.pop() if slow_once else 0.0)

    warm = [0.2, 0.2]  # the turn that is not counted: a call to wake up and a call
    seconds = Timing(repeats=2, calls=1, warm_up=0).seconds({"a": lambda: run("a", warm), "b": lambda: run("b", [])})
    assert order == ["a", "a", "b", "b"] * 3
    assert seconds["a"] < 0.1


@pytest.mark.parametrize(("statistic", "expected"), [("median", 0.01), ("fastest", 0.0)])
def test_the_statistic_is_the_one_asked_for(statistic, expected):
    waits = iter([0.0, 0.0, 0.5, 0.0, 0.5, 0.01, 0.5, 0.02])  # every other call begins a turn
    found = Timing(repeats=3, calls=1, statistic=statistic, warm_up=0).seconds({"a": lambda: time.sleep(next(waits))})
    assert found["a"] == pytest.approx(expected, abs=0.008)


def test_processor_time_does_not_count_waiting():
    found = Timing(repeats=1, calls=1, clock="cpu").seconds({"a": lambda: time.sleep(0.05)})
    assert found["a"] < 0.02


def test_rotation_goes_round():
    seen: list[int] = []
    run = rotate([lambda: seen.append(0), lambda: seen.append(1)])
    for _ in range(3):
        run()
    assert seen == [0, 1, 0]


def test_candidates_over_the_same_memory_never_read_what_another_has_just_read():
    read: list[tuple[str, int]] = []
    position = count()
    runs = {name: rotate([partial(read.append, (name, piece)) for piece in range(4)], position) for name in ("a", "b")}
    for _ in range(2):
        runs["a"]()
        runs["b"]()
    assert read == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]


def test_bandwidth_of_a_small_footprint_is_a_positive_number():
    found = stream.Stream(footprint=1 << 20).measure(Timing(repeats=2, calls=1))
    assert found.read > 1e8 and found.copy > 1e8
    assert "GB/s read" in found.text()
