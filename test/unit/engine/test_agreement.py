"""Ranks whose clocks disagree choose the same draft length at every step, because one of them decides for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from support.ranks import RANKS, decide

from sglang_er.engine.agreement import agreed


@pytest.mark.parametrize("together", [True, False])
def test_ranks_with_different_clocks(tmp_path: Path, together: bool) -> None:
    """Alone they diverge: without that the test would show nothing."""
    multiprocessing.spawn(decide, args=(str(tmp_path), together), nprocs=RANKS)
    first, second = ((tmp_path / f"chosen{rank}").read_text() for rank in range(RANKS))
    assert (first == second) is together
    assert len(set(first.split(","))) > 2


def test_one_rank_needs_nobody() -> None:
    assert agreed(3, None) == 3
