"""Ranks whose clocks disagree choose the same draft length at every step, because one of them decides for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from support.ranks import RANKS, decide, exchange

from sglang_er.engine.ranks import ALONE


@pytest.mark.parametrize("together", [True, False])
def test_ranks_with_different_clocks(tmp_path: Path, together: bool) -> None:
    """Alone they diverge: without that the test would show nothing."""
    multiprocessing.spawn(decide, args=(str(tmp_path), together), nprocs=RANKS)
    first, second = ((tmp_path / f"chosen{rank}").read_text() for rank in range(RANKS))
    assert (first == second) is together
    assert len(set(first.split(","))) > 2


def test_one_rank_needs_nobody() -> None:
    assert ALONE.agreed(3) == 3
    assert ALONE.seconds(0.5) == 0.5
    assert ALONE.told("text") == "text"


def test_the_first_rank_is_believed_unless_another_cannot_draft(tmp_path: Path) -> None:
    multiprocessing.spawn(exchange, args=(str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        assert (tmp_path / f"heard{rank}").read_text() == repr([3, 0, 0, 0.25, "text of 0", [1, 2], (rank == 0, False)])
