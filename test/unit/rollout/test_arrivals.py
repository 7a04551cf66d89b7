"""The work of a simulated rollout: lengths by the rule that was asked for, arrivals and conversations that add up."""

from __future__ import annotations

import statistics

import pytest

from sglang_er.rollout import lengths as length_files
from sglang_er.rollout.arrivals import Arrivals, make_work, parse_arrivals, parse_lengths


def test_a_length_file_is_replayed_whole_and_drawn_from_when_a_number_is_asked_for():
    batches = length_files.load()
    longtail = parse_lengths("longtail")
    assert make_work(longtail, None, 10, Arrivals(), seed=3).lengths == batches[3]
    assert make_work(longtail, None, 10, Arrivals(), seed=13).lengths == batches[3]
    drawn = make_work(longtail, 128, 10, Arrivals(), seed=0).lengths
    assert len(drawn) == 128 and set(drawn) <= {length for batch in batches for length in batch}
    assert drawn == make_work(longtail, 128, 10, Arrivals(), seed=0).lengths
    assert drawn != make_work(longtail, 128, 10, Arrivals(), seed=1).lengths


def test_lognormal_lengths_have_their_mean_and_end_at_the_cap():
    drawn = parse_lengths("lognormal:500,0.5,4000").take(20_000, 0)
    assert statistics.fmean(drawn) == pytest.approx(500, rel=0.02)
    assert min(drawn) >= 1 and max(drawn) <= 4000
    capped = parse_lengths("lognormal:500,0.5,8192,0.1").take(20_000, 0)
    assert capped.count(8192) == pytest.approx(2000, rel=0.1)


def test_open_arrivals_have_their_rate():
    work = make_work(parse_lengths("lognormal:5,0,5"), 5000, 7, parse_arrivals("open:10"), 0)
    assert work.arrival == sorted(work.arrival)
    assert work.arrival[-1] == pytest.approx(500, rel=0.05)
    assert set(work.prompts) == {7} == set(work.new_tokens) and set(work.following) == {-1}


def test_a_conversation_remembers_what_was_said():
    work = make_work(parse_lengths("lognormal:20,1,100"), 3, 50, parse_arrivals("turns:4", 2.0, 9), 0)
    assert len(work.lengths) == 12
    assert [time == 0 for time in work.arrival] == ([True] + [False] * 3) * 3
    for first in (0, 4, 8):
        assert work.following[first : first + 4] == [first + 1, first + 2, first + 3, -1]
        assert work.new_tokens[first : first + 4] == [50, 9, 9, 9]
        for turn in range(first, first + 3):
            assert work.prompts[turn + 1] == work.prompts[turn] + work.lengths[turn] + 9


def test_waves_come_after_each_other_and_hold_every_request_once():
    work = make_work(parse_lengths("lognormal:20,1,100"), 3, 50, parse_arrivals("waves:4,2"), 0)
    assert work.arrival == [0.0] * 3 + [float("inf")] * 9
    assert [list(wave) for wave in work.waves] == [[3, 4, 5], [6, 7, 8], [9, 10, 11]] and work.left == 2
    assert len(work.lengths) == len(work.prompts) == 12 and set(work.following) == {-1}


@pytest.mark.parametrize(
    "text",
    [
        *("closed:3", "open", "open:0", "open:x", "turns:0", "turns:1.5", "sometimes", "open:inf"),
        *("waves", "waves:2", "waves:0,1", "waves:2,-1", "waves:2,1,1"),
    ],
)
def test_unknown_arrivals_are_one_line(text: str):
    with pytest.raises(ValueError, match=f"--arrivals {text}: must be closed, open:RATE, turns:K or waves"):
        parse_arrivals(text)


@pytest.mark.parametrize(
    "text", ["lognormal:", "lognormal:5,1", "lognormal:0,1,9", "lognormal:5,1,9,2", "lognormal:a,b,c"]
)
def test_unknown_lengths_are_one_line(text: str):
    with pytest.raises(ValueError, match="must be lognormal:MEAN,SIGMA,CAP") as caught:
        parse_lengths(text)
    assert "\n" not in str(caught.value)
