"""Step costs from a sweep: forwards timed over batch size B, context S and draft length gamma.

A sweep is a CSV file with the columns batch, seq, gamma, mode and median_ms (others are ignored, so are rows with
batch 0, other modes, and lines that begin with #). Modes:

  target_decode   T_ar(B, S), gamma 0
  drafter_decode  T_draft(B, S), one drafted token. It is timed once per gamma although gamma changes nothing in it:
                  the median over gammas is taken, which leaves out runs that caught a ragged batch
  target_verify   T_verify(B, S, gamma), a forward over gamma + 1 tokens per request

A missing cell is filled by the line through its neighbours in S: the two around it, or the two nearest.

Cleaning: more requests, more context or more drafts never make a pass cheaper, so each table is replaced by the nearest
one (least squares) that rises in B, then by the nearest that rises in S, then in gamma. A later step keeps what an
earlier one made: the nearest rising row to a row that is nowhere smaller is nowhere smaller. Where the measured medians
rise already, they are unchanged.

Between grid points T is linear in B, in S and in gamma. For a fixed B that is also linear in the rows B * (gamma + 1)
of the forward, which is what its arithmetic depends on. Verify is anchored at gamma 0 by T_ar, or by the shortest
measured verify where that is cheaper; gamma 1 and 2 of a sweep that begins at 3 lie between.

Beyond the grid:
  B up to twice the largest: the line from the grid point at half the largest B (or below) to the largest. A longer base
    than the last cell, because GEMMs grow in steps of their tile. Larger batches are refused.
  S above the largest: the line in the same manner, without end. Such lines never fall, nor do they cross those of a
    smaller batch, context or gamma up to twice the largest S.
  S below the smallest: the smallest. Weights dominate there.
  gamma above the largest: refused.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from sglang_er.rollout.oracle import rising

Table = npt.NDArray[np.float64]
Cells = dict[tuple[int, int, int], list[float]]  # (gamma, batch, context) -> seconds
MODES = ("target_decode", "drafter_decode", "target_verify")
COLUMNS = ("batch", "seq", "gamma", "mode", "median_ms")
PREFIX, SUFFIX = "sweep_", ".csv"


def names() -> list[str]:
    """The sweeps that come with the package."""
    files = (entry.name for entry in (resources.files(__package__) / "assets").iterdir())
    return sorted(name[len(PREFIX) : -len(SUFFIX)] for name in files if name.startswith(PREFIX))


class Sweep:
    """Costs by interpolation (`StepCosts`)."""

    def __init__(self, name: str, cells: Mapping[str, Cells]) -> None:
        self.name = name
        batches = sorted({batch for _, batch, _ in cells["target_decode"]})
        contexts = sorted({context for _, _, context in cells["target_decode"]})
        gammas = sorted({gamma for gamma, _, _ in cells["target_verify"]})
        plain = self._table("target_decode", cells, batches, contexts, [0])[0]
        every = self._table("drafter_decode", cells, batches, contexts, [0])[0]
        verify = self._table("target_verify", cells, batches, contexts, gammas)
        plain, draft = _risen(plain), _risen(every)
        verify = np.stack([_risen(table) for table in verify])
        verify = np.apply_along_axis(_risen_line, 0, verify)
        verify = np.concatenate([np.minimum(plain, verify[0])[None], verify])
        self.gamma_max, self.batch_max = gammas[-1], 2 * batches[-1]
        self._gammas = [0, *gammas]
        self._batches, self._contexts = [*batches, 2 * batches[-1]], [*contexts, 2 * contexts[-1]]
        self._plain, self._draft = (_extended(table, batches, contexts).tolist() for table in (plain, draft))
        verify = np.stack([_extended(table, batches, contexts) for table in verify])
        self._verify = np.maximum.accumulate(verify, axis=0).tolist()

    def plain(self, batch: int, context: float) -> float:
        return self._between(self._plain, batch, context)

    def draft(self, batch: int, context: float) -> float:
        return self._between(self._draft, batch, context)

    def verify(self, batch: int, context: float, gamma: int) -> float:
        if not 0 <= gamma <= self.gamma_max:
            raise ValueError(f"{self.name} has verify passes of up to {self.gamma_max} drafts, not {gamma}")
        low, weight = _cell(self._gammas, gamma)
        below = self._between(self._verify[low], batch, context)
        return below + weight * (self._between(self._verify[low + 1], batch, context) - below) if weight else below

    def _between(self, table: Sequence[Sequence[float]], batch: int, context: float) -> float:
        if not 1 <= batch <= self.batch_max:
            raise ValueError(f"{self.name} reaches batches of 1 to {self.batch_max} requests, not {batch}")
        row, down = _cell(self._batches, batch)
        column, right = _cell(self._contexts, context)
        upper, lower = table[row], table[row + 1]
        start = upper[column] + right * (upper[column + 1] - upper[column])
        end = lower[column] + right * (lower[column + 1] - lower[column])
        return start + down * (end - start)

    def _table(
        self, mode: str, cells: Mapping[str, Cells], batches: list[int], contexts: list[int], gammas: list[int]
    ) -> Table:
        """[gamma, batch, context], without holes."""
        table = np.full((len(gammas), len(batches), len(contexts)), np.nan)
        for (gamma, batch, context), seconds in cells[mode].items():
            if batch in batches and context in contexts:
                at = gammas.index(gamma) if gamma in gammas else 0
                table[at, batches.index(batch), contexts.index(context)] = median(seconds)
        for g, gamma in enumerate(gammas):
            for b, batch in enumerate(batches):
                if np.isfinite(table[g, b]).sum() < min(2, len(contexts)):
                    raise ValueError(f"{self.name}: {mode} at batch {batch}, gamma {gamma} has too few contexts")
                table[g, b] = _filled(contexts, table[g, b])
        return table


def _filled(contexts: Sequence[int], row: Table) -> Table:
    """Holes take the value of the line through the two known neighbours."""
    known = [i for i, value in enumerate(row) if np.isfinite(value)]
    filled = row.copy()
    for i in set(range(len(row))) - set(known):
        after = min(max(bisect_right(known, i), 1), len(known) - 1)
        left, right = known[after - 1], known[after]
        slope = (row[right] - row[left]) / (contexts[right] - contexts[left])
        filled[i] = row[left] + slope * (contexts[i] - contexts[left])
    return filled


def _risen_line(line: Table) -> Table:
    return np.asarray([value for _, value in rising([(i, float(value), 1.0) for i, value in enumerate(line)])])


def _risen(table: Table) -> Table:
    """[batch, context], rising in both."""
    return np.apply_along_axis(_risen_line, 1, np.apply_along_axis(_risen_line, 0, table))


def _extended(table: Table, batches: Sequence[int], contexts: Sequence[int]) -> Table:
    """One more batch and one more context, each twice the largest: the end of the line that goes beyond the grid."""
    for axis, grid in enumerate((batches, contexts)):
        lines = np.moveaxis(table, axis, 0)
        half = max((i for i, value in enumerate(grid[:-1]) if 2 * value <= grid[-1]), default=0)
        slope = (lines[-1] - lines[half]) / (grid[-1] - grid[half]) if len(grid) > 1 else 0.0 * lines[-1]
        table = np.moveaxis(np.concatenate([lines, [lines[-1] + slope * grid[-1]]]), 0, axis)
    # Each row has a slope of its own: behind the grid, lines could cross.
    return np.maximum.accumulate(np.maximum.accumulate(table, axis=0), axis=1)


def _cell(grid: Sequence[int], value: float) -> tuple[int, float]:
    """Index of the grid point below, and how far `value` is on the way to the next: above 1 behind the last."""
    low = min(max(bisect_right(grid, value), 1), len(grid) - 1) - 1
    return low, max(0.0, (value - grid[low]) / (grid[low + 1] - grid[low]))


def read(name: str, lines: Iterable[str]) -> Sweep:
    """Raises ValueError with one line that says what is wrong with the file."""
    reader = csv.DictReader(line for line in lines if line.strip() and not line.startswith("#"))
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{name}: not a sweep, column {', '.join(missing)} is missing")
    cells: dict[str, Cells] = {mode: defaultdict(list) for mode in MODES}
    for row in reader:
        if row["mode"] not in MODES or row["batch"] == "0":
            continue
        try:
            batch, context, gamma = int(row["batch"]), int(row["seq"]), int(row["gamma"])
            seconds = float(row["median_ms"]) / 1e3
        except (TypeError, ValueError):
            raise ValueError(f"{name}: not numbers: {','.join(str(row[column]) for column in COLUMNS)}") from None
        if not (batch > 0 and context > 0 and gamma >= 0 and 0 < seconds < float("inf")):
            raise ValueError(f"{name}: not positive: {','.join(row[column] for column in COLUMNS)}")
        if row["mode"] != "target_verify":
            gamma = 0
        cells[row["mode"]][gamma, batch, context].append(seconds)
    for mode, found in cells.items():
        if not found:
            raise ValueError(f"{name}: no row with mode {mode}")
    if min(gamma for gamma, _, _ in cells["target_verify"]) < 1:
        raise ValueError(f"{name}: target_verify needs a gamma of at least 1")
    return Sweep(name, cells)


def load(name: str) -> Sweep:
    """A sweep of the package by its name, or a CSV file. Raises ValueError or OSError in one line."""
    source = resources.files(__package__) / "assets" / f"{PREFIX}{name}{SUFFIX}" if name in names() else Path(name)
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"--sweep {name}: no such file, and none of {', '.join(names())}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--sweep {name}: not a CSV file") from None
    return read(name, text.splitlines())
