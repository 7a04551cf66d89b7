"""Cells in a process of their own: a kernel that faults spoils all that its process does on the GPU afterwards, and one
that hangs never ends. Then the process is ended, and the next cell gets a new one.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from .sections import Cell, CellError, Context, Options, Section, Skip, Values, shortened

STOP_SECONDS = 10.0


class Worker:
    """One process at a time, started by the first call. `cells` of a section must be a function of a module."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._process: Any = None
        self._pipe: Any = None

    def call(self, section: Section, cell: str, timeout: float) -> Values:
        """What the cell returns. Raises what it raises, as Skip or CellError."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send((section.cells, cell))
            if not self._pipe.poll(timeout):
                raise CellError(f"no answer within {timeout:.0f} s: its process was ended")
            kind, content = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(STOP_SECONDS)
            code = self._process.exitcode
            self.stop()
            raise CellError(f"its process ended with exit code {code}") from None
        except CellError:
            self.stop()
            raise
        if kind == "skip":
            raise Skip(content)
        if kind == "error" or not content.get("passed", True):
            # After a wrong or failed launch nothing in that process can be trusted.
            self.stop()
        if kind == "error":
            raise CellError(content)
        return content  # type: ignore[no-any-return]

    def stop(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join(STOP_SECONDS)
        self._process = self._pipe = None

    def _start(self) -> None:
        start = multiprocessing.get_context("spawn")
        self._pipe, theirs = start.Pipe()
        self._process = start.Process(target=_serve, args=(theirs, self._options), daemon=True)
        self._process.start()
        theirs.close()


def _serve(pipe: Connection, options: Options) -> None:
    context = Context(options)
    while True:
        try:
            cells, name = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(cells, name, context))


def _answer(cells: Callable[[Options], Sequence[Cell]], name: str, context: Context) -> tuple[str, Any]:
    try:
        cell = next(cell for cell in cells(context.options) if cell.name == name)
        return "values", dict(cell.run(context))
    except Skip as reason:
        return "skip", str(reason)
    except Exception:
        return "error", shortened(traceback.format_exc())
