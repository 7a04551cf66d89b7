"""Step costs from a sweep: exact where measured, straight between, never falling, clear about a bad file."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest

from sglang_er.rollout import sweep
from sglang_er.rollout.costs import CONTEXT_STEP, PrivateKv, StepTable

BATCHES, CONTEXTS, GAMMAS = (1, 2, 4), (256, 512, 1024), (3, 7)
HEADER = "batch,seq,gamma,mode,median_ms"


def plain(b: float, s: float) -> float:
    return 8 + b + s / 256


def verify(b: float, s: float, g: float) -> float:
    return plain(b, s) + b * g / 2


def rows(skip=()) -> list[str]:
    found = [HEADER, "# a remark", "0,0,0,target_decode,1", "1,256,3,target_decode_sd,99"]
    for b, s in product(BATCHES, CONTEXTS):
        found.append(f"{b},{s},0,target_decode,{plain(b, s)}")
        for g in GAMMAS:
            found.append(f"{b},{s},{g},drafter_decode,{plain(b, s) / 2 + (g == 7)}")
            found.append(f"{b},{s},{g},target_verify,{verify(b, s, g)}")
    return [line for line in found if not any(line.startswith(start) for start in skip)]


def made(skip=()) -> sweep.Sweep:
    return sweep.read("made", rows(skip))


def test_grid_points_are_the_measured_medians():
    costs = made()
    for b, s in product(BATCHES, CONTEXTS):
        assert costs.plain(b, s) == pytest.approx(plain(b, s) / 1e3)
        assert costs.draft(b, s) == pytest.approx((plain(b, s) / 2 + 0.5) / 1e3)  # median over two draft lengths
        for g in GAMMAS:
            assert costs.verify(b, s, g) == pytest.approx(verify(b, s, g) / 1e3)


def test_between_grid_points_costs_are_straight_and_short_drafts_begin_at_plain_decode():
    costs = made()
    assert costs.plain(3, 700) == pytest.approx(plain(3, 700) / 1e3)
    assert costs.verify(3, 300, 5) == pytest.approx(verify(3, 300, 5) / 1e3)
    assert costs.verify(2, 512, 1) == pytest.approx(verify(2, 512, 1) / 1e3)


def test_beyond_the_grid_the_line_goes_on():
    costs = made()
    assert costs.batch_max == 8 and costs.gamma_max == 7
    assert costs.plain(8, 512) == pytest.approx(plain(8, 512) / 1e3)
    assert costs.plain(4, 5000) == pytest.approx(plain(4, 5000) / 1e3)
    assert costs.plain(2, 10) == costs.plain(2, 256)
    with pytest.raises(ValueError, match="reaches batches of 1 to 8 requests, not 9"):
        costs.plain(9, 512)
    with pytest.raises(ValueError, match="up to 7 drafts, not 8"):
        costs.verify(1, 512, 8)


def test_a_missing_cell_is_on_the_line_through_its_neighbours():
    costs = made(skip=("4,1024,7,target_verify", "2,512,7,target_verify"))
    assert costs.verify(4, 1024, 7) == pytest.approx(verify(4, 1024, 7) / 1e3)
    assert costs.verify(2, 512, 7) == pytest.approx(verify(2, 512, 7) / 1e3)


def test_what_falls_is_pooled_and_rises_afterwards():
    lines = [line.replace("2,512,0,target_decode,12.0", "2,512,0,target_decode,20.0") for line in rows()]
    assert lines != rows()
    costs = sweep.read("made", lines)
    grid = [[costs.plain(b, s) for s in CONTEXTS] for b in BATCHES]
    assert all(a <= b for row in grid for a, b in pairwise(row))
    assert all(a <= b for column in zip(*grid) for a, b in pairwise(column))


@pytest.mark.parametrize("name", sweep.names())
def test_published_sweeps_never_fall(name: str):
    costs = sweep.load(name)
    assert costs.batch_max == 128 and costs.gamma_max == 15
    batches, contexts = (1, 3, 8, 20, 48, 64, 80, 128), (100, 256, 700, 3000, 4096, 6000, 8192)
    for s in contexts:
        for a, b in pairwise(batches):
            assert costs.plain(a, s) <= costs.plain(b, s) and costs.draft(a, s) <= costs.draft(b, s)
            assert all(costs.verify(a, s, g) <= costs.verify(b, s, g) for g in range(1, 16))
    for b in batches:
        for s, t in pairwise(contexts):
            assert costs.plain(b, s) <= costs.plain(b, t) and costs.draft(b, s) <= costs.draft(b, t)
        for s in contexts:
            assert all(costs.verify(b, s, g) <= costs.verify(b, s, g + 1) + 1e-12 for g in range(1, 15))


def test_published_medians_are_kept_where_they_rise():
    costs = sweep.load("a100-qwen2.5-7b")
    assert costs.plain(32, 512) == pytest.approx(11.20e-3, rel=0.001)
    assert costs.verify(8, 4096, 7) == pytest.approx(14.57e-3, rel=0.001)
    assert costs.draft(8, 512) == pytest.approx((4.64 + 4.90) / 2e3, rel=0.01)  # medians of four draft lengths


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a,b", "1,2"], "column batch, seq, gamma, mode, median_ms is missing"),
        ([HEADER, "1,256,0,target_decode,x"], "not numbers: 1,256,0,target_decode,x"),
        ([HEADER, "1,256,0,target_decode"], "not numbers"),
        ([HEADER, "1,256,0,target_decode,-1"], "not positive"),
        ([HEADER, "1,256,0,target_decode,1"], "no row with mode drafter_decode"),
        (
            [line for line in rows() if not line.startswith("4,") or "verify" not in line],
            "batch 4, gamma 3 has too few",
        ),
    ],
)
def test_a_bad_file_is_one_clear_line(lines: list[str], words: str):
    with pytest.raises(ValueError, match=words) as caught:
        sweep.read("bad.csv", lines)
    assert str(caught.value).startswith("bad.csv") and "\n" not in str(caught.value)


def test_a_file_is_read_by_its_path_and_an_unknown_name_lists_the_known(tmp_path: Path):
    (tmp_path / "mine.csv").write_text("\n".join(rows()))
    assert sweep.load(str(tmp_path / "mine.csv")).plain(1, 256) == pytest.approx(plain(1, 256) / 1e3)
    with pytest.raises(ValueError, match="--sweep nope: no such file, and none of a100-llama"):
        sweep.load("nope")


def test_a_table_holds_whole_steps_for_every_draft_length():
    costs = made()
    cycle = StepTable(costs, 3).at(2, 512 + CONTEXT_STEP / 4)  # rounded to 512
    assert len(cycle.seconds) == 4
    assert cycle.seconds[0] == costs.plain(2, 512)
    assert cycle.seconds[3] == pytest.approx(3 * costs.draft(2, 512) + costs.verify(2, 512, 3))
    with pytest.raises(ValueError, match="--gamma-max 8: made knows draft lengths from 0 to 7"):
        StepTable(costs, 8)


def test_private_kv_costs_every_pass_the_reading_of_all_contexts_but_one():
    costs = made()
    private = PrivateKv(costs, 1e-6)
    assert private.plain(1, 512) == costs.plain(1, 512)
    for mine, theirs in (
        (private.plain(4, 512), costs.plain(4, 512)),
        (private.draft(4, 512), costs.draft(4, 512)),
        (private.verify(4, 512, 3), costs.verify(4, 512, 3)),
    ):
        assert mine == pytest.approx(theirs + 1e-6 * 3 * 512)
