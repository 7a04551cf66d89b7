"""The GPU check's own running: what is recorded when, what is skipped, what ends where; with pretended sections."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu.records import Identity, Journal, read  # noqa: E402
from gpu.sections import Cell, CellError, Context, Options, Section, Skip, run, table  # noqa: E402
from gpu.worker import Worker  # noqa: E402

IDENTITY = Identity("abc", "H200", False, {"torch": "2.11"})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class NoWorker:
    def call(self, section: Section, cell: str, timeout: float) -> dict[str, object]:
        raise AssertionError("no section here is isolated")

    def stop(self) -> None: ...


def section(name: str, **cells: Callable[[Context], dict[str, object]]) -> Section:
    return Section(name, lambda options: [Cell(cell, function) for cell, function in cells.items()])


def go(tmp_path: Path, sections: list[Section], journal: Journal | None = None, **rest):
    journal = journal or Journal(tmp_path / "records.jsonl", IDENTITY)
    return run(sections, journal, Context(Options(tmp_path), None, journal.find), NoWorker(), **rest)


def fails(context: Context) -> dict[str, object]:
    raise ValueError("the kernel is wrong")


def impossible(context: Context) -> dict[str, object]:
    raise Skip("no such thing here")


def test_a_record_says_where_it_comes_from_and_is_there_before_the_next_cell(tmp_path: Path):
    file = tmp_path / "records.jsonl"
    seen = []

    def second(context: Context) -> dict[str, object]:
        seen.extend(read(file))
        return {"us": 4}

    tallies = go(tmp_path, [section("s", first=lambda context: {"us": 3}, second=second)])
    assert [record["cell"] for record in seen] == ["first"]
    assert tallies[0].passed
    (first, last) = read(file)
    expected = {"section": "s", "cell": "first", "status": "passed", "values": {"us": 3}, "commit": "abc"}
    assert expected.items() <= first.items()
    assert first["device"] == "H200" and first["versions"] == {"torch": "2.11"} and first["seconds"] >= 0
    assert last["values"] == {"us": 4} and last["date"].endswith("Z")


def test_a_failed_cell_is_recorded_with_its_error_and_the_rest_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ran = []
    sections = [
        section("broken", bad=fails, wrong=lambda c: {"passed": False, "error": 0.5}, good=lambda c: {}),
        section("after", good=lambda c: ran.append(1) or {}),
    ]
    broken, after = go(tmp_path, sections)
    assert not broken.passed and after.passed and ran == [1]
    assert broken.counts == {"passed": 1, "failed": 1, "error": 1, "skipped": 0}
    record = read(tmp_path / "records.jsonl")[0]
    assert record["status"] == "error" and "the kernel is wrong" in record["values"]["error"]
    assert "ValueError: the kernel is wrong" in capsys.readouterr().out


def test_a_section_whose_cells_cannot_be_listed_fails_alone(tmp_path: Path):
    def cells(options: Options) -> list[Cell]:
        raise ImportError("no such module")

    broken, after = go(tmp_path, [Section("broken", cells), section("after", good=lambda c: {})])
    assert not broken.passed and after.passed
    assert "no such module" in read(tmp_path / "records.jsonl")[0]["values"]["error"]


def test_a_skipped_cell_says_why_and_fails_nothing(tmp_path: Path):
    (tally,) = go(tmp_path, [section("s", a=impossible)])
    assert tally.passed and tally.counts["skipped"] == 1
    assert read(tmp_path / "records.jsonl")[0]["values"] == {"reason": "no such thing here"}


def test_a_later_run_measures_only_what_is_missing(tmp_path: Path):
    ran: list[str] = []

    def cell(name: str, result: Callable[[Context], dict[str, object]]) -> Callable[[Context], dict[str, object]]:
        return lambda context: ran.append(name) or result(context)

    def sections() -> list[Section]:
        return [
            section(
                "s",
                good=cell("good", lambda c: {}),
                wrong=cell("wrong", lambda c: {"passed": False}),
                bad=cell("bad", fails),
                skipped=cell("skipped", impossible),
            )
        ]

    go(tmp_path, sections())
    ran.clear()
    (tally,) = go(tmp_path, sections())
    assert ran == ["bad", "skipped"]  # what was measured stays, right or wrong; what was not is tried again
    assert tally.known == 2 and not tally.passed


@pytest.mark.parametrize(
    ("other", "known"),
    [
        (IDENTITY, True),
        (Identity("def", "H200", False, {}), False),
        (Identity("abc", "H100", False, {}), False),
        (Identity("abc", "H200", True, {}), False),
    ],
)
def test_records_of_another_commit_or_device_count_for_nothing(tmp_path: Path, other: Identity, known: bool):
    earlier, file = tmp_path / "earlier.jsonl", tmp_path / "records.jsonl"
    Journal(earlier, other).append("s", "a", "passed", 1.0, {"us": 3})
    assert Journal(file, IDENTITY, [earlier]).measured("s", "a") == known
    assert len(read(file)) == known  # taken over: the new file is whole
    assert Journal(file, IDENTITY, [earlier]).measured("s", "a") == known
    assert len(read(file)) == known  # once


def test_a_line_that_was_cut_off_is_no_record(tmp_path: Path):
    file = tmp_path / "records.jsonl"
    Journal(file, IDENTITY).append("s", "a", "passed", 1.0, {})
    whole = file.read_text()
    file.write_text(whole + whole[:30])
    assert [record["cell"] for record in read(file)] == ["a"]
    journal = Journal(file, IDENTITY)
    journal.append("s", "b", "passed", 1.0, {})
    assert [record["cell"] for record in read(file)] == ["a", "b"]


def test_no_cell_begins_when_the_time_is_over(tmp_path: Path):
    clock = Clock()

    def slow(context: Context) -> dict[str, object]:
        clock.now += 6
        return {}

    sections = [section("s", a=slow, b=slow, c=slow), section("t", d=slow)]
    first, second = go(tmp_path, sections, seconds=10, clock=clock)
    assert (first.counts["passed"], first.left, second.left) == (2, 1, 1)
    assert not first.passed and not second.passed
    again = go(tmp_path, sections, seconds=100, clock=clock)
    assert all(tally.passed for tally in again) and again[0].known == 2


def test_the_table_has_a_row_for_every_section(tmp_path: Path):
    text = table(go(tmp_path, [section("one", a=lambda c: {}), section("two", b=fails)]))
    lines = [line.split() for line in text.splitlines()]
    assert lines[1][:4] == ["one", "1", "0", "0"] and lines[2][:4] == ["two", "0", "0", "1"]


PRETENDED = """
import os, time
from gpu.sections import Cell, Skip

def skip(context):
    raise Skip("not here")

def fail(context):
    raise ValueError("boom")

def cells(options):
    return [
        Cell("process", lambda context: {"pid": os.getpid(), "device": context.options.device}),
        Cell("dies", lambda context: os._exit(7)),
        Cell("hangs", lambda context: time.sleep(60)),
        Cell("wrong", lambda context: {"passed": False, "pid": os.getpid()}),
        Cell("skips", skip),
        Cell("fails", fail),
    ]
"""


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pretended_cells.py").write_text(PRETENDED)
    monkeypatch.syspath_prepend(str(tmp_path))
    import pretended_cells

    worker = Worker(Options(tmp_path, dry_run=True))
    yield lambda cell, timeout=60.0: worker.call(Section("s", pretended_cells.cells, isolated=True), cell, timeout)
    worker.stop()
    sys.modules.pop("pretended_cells")


def test_isolated_cells_share_a_process_until_one_breaks_it(isolated):
    first = isolated("process")["pid"]
    assert isolated("process") == {"pid": first, "device": "cpu"}
    with pytest.raises(Skip, match="not here"):
        isolated("skips")
    assert isolated("process")["pid"] == first
    with pytest.raises(CellError, match="ValueError: boom"):
        isolated("fails")
    second = isolated("process")["pid"]
    assert second != first
    assert isolated("wrong") == {"passed": False, "pid": second}
    third = isolated("process")["pid"]
    assert third != second  # a wrong result may come from a spoilt process
    with pytest.raises(CellError, match="exit code 7"):
        isolated("dies")
    with pytest.raises(CellError, match="no answer within 1 s"):
        isolated("hangs", 1.0)
    assert isolated("process")["device"] == "cpu"


def test_records_are_one_json_object_a_line(tmp_path: Path):
    go(tmp_path, [section("s", a=lambda c: {"text": "two\nlines"})])
    (line,) = (tmp_path / "records.jsonl").read_text().splitlines()
    assert json.loads(line)["values"]["text"] == "two\nlines"
