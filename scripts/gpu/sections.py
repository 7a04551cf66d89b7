"""What a section is, and how sections are run: cell by cell, each recorded at once, until the time is over."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .records import ERROR, FAILED, PASSED, SKIPPED, Journal

if TYPE_CHECKING:
    from .servers import Servers

ERROR_LINES, ERROR_CHARS = 12, 400
# A cell of an isolated section that has not ended by then hangs; a server gets as long for one cell.
CELL_SECONDS = 300.0

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """What a cell may ask; goes to other processes. `out`: folder for files; `url`: a server to use."""

    out: Path
    dry_run: bool = False
    url: str | None = None
    cuda_graph: bool = False
    eager: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"


class Skip(Exception):
    """A cell that cannot be measured here; says why."""


class CellError(Exception):
    """A cell that failed in another process, with that process's last lines."""


class Find(Protocol):
    def __call__(self, section: str, cell: str) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class Context:
    """`servers`: None in the process of an isolated section; `find`: the record of a cell, if there is one."""

    options: Options
    servers: Servers | None = None
    find: Find = lambda section, cell: None


@dataclass(frozen=True)
class Cell:
    """`run` returns what was measured, with `passed` False where that is wrong; `shown`: the part for the screen."""

    name: str
    run: Callable[[Context], Values]


@dataclass(frozen=True)
class Section:
    """`isolated`: cells run in a process of their own, which a broken kernel may take down."""

    name: str
    cells: Callable[[Options], Sequence[Cell]]
    isolated: bool = False


class Isolated(Protocol):
    """Runs a cell elsewhere (`worker.py`)."""

    def call(self, section: Section, cell: str, timeout: float) -> Values: ...

    def stop(self) -> None: ...


@dataclass
class Tally:
    """Of one section: cells by status, those there from an earlier run among them; `left`: not begun."""

    name: str
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((PASSED, FAILED, ERROR, SKIPPED), 0))
    known: int = 0
    left: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not (self.counts[FAILED] or self.counts[ERROR] or self.left)


def run(
    sections: Sequence[Section],
    journal: Journal,
    context: Context,
    isolated: Isolated,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> list[Tally]:
    """Every section in turn; no new cell begins after `seconds`."""
    deadline = clock() + seconds
    tallies = []
    for section in sections:
        tally, began = Tally(section.name), clock()
        tallies.append(tally)
        try:
            cells = section.cells(context.options)
        except Exception:
            journal.append(section.name, "cells", ERROR, clock() - began, {"error": last_lines()})
            tally.counts[ERROR] += 1
            continue
        for cell in cells:
            if journal.measured(section.name, cell.name):
                tally.known += 1
                tally.counts[journal.find(section.name, cell.name)["status"]] += 1  # type: ignore[index]
            elif clock() >= deadline:
                tally.left += 1
            else:
                tally.counts[_run_cell(section, cell, journal, context, isolated, clock)] += 1
        if section.isolated:
            isolated.stop()
        tally.seconds = clock() - began
    return tallies


def _run_cell(
    section: Section,
    cell: Cell,
    journal: Journal,
    context: Context,
    isolated: Isolated,
    clock: Callable[[], float],
) -> str:
    began = clock()
    values: dict[str, Any] = {}
    try:
        if section.isolated:
            values = dict(isolated.call(section, cell.name, CELL_SECONDS))
        elif context.servers is not None:
            with context.servers.watched(CELL_SECONDS):
                values = dict(cell.run(context))
        else:
            values = dict(cell.run(context))
        status = PASSED if values.pop("passed", True) else FAILED
        text = str(values.get("shown", ""))
    except Skip as reason:
        status, text = SKIPPED, str(reason)
        values = {"reason": text}
    except Exception as error:
        lines = str(error) if isinstance(error, CellError) else last_lines()
        status, text = ERROR, lines.splitlines()[-1]
        values = {"error": lines}
    record = journal.append(section.name, cell.name, status, clock() - began, values)
    print(f"{section.name:13} {cell.name:38} {status:7} {record['seconds']:6.1f} s  {text}", flush=True)
    return status


def last_lines() -> str:
    """Of the exception that is being handled."""
    return shortened(traceback.format_exc())


def shortened(text: str) -> str:
    return "\n".join(line[:ERROR_CHARS] for line in text.rstrip().splitlines()[-ERROR_LINES:])


def table(tallies: Sequence[Tally]) -> str:
    """What the user reads last."""
    rows: list[tuple[str, ...]] = [("section", PASSED, FAILED, ERROR, SKIPPED, "left", "known", "seconds")]
    for tally in tallies:
        counts = (tally.counts[status] for status in (PASSED, FAILED, ERROR, SKIPPED))
        rows.append((tally.name, *map(str, counts), str(tally.left), str(tally.known), f"{tally.seconds:.0f}"))
    return "\n".join(f"{row[0]:14}" + "".join(f"{text:>9}" for text in row[1:]) for row in rows)
