"""The torch allocator hands out what upstream's Triton one promises: own pages, filled in order, all or nothing."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from sglang_er.engine.cpu.allocator import CpuPagedAllocator
from sglang_er.engine.cpu.patches import assign_req_to_token_pool


def make(size: int, page: int) -> CpuPagedAllocator:
    cache = SimpleNamespace()
    return CpuPagedAllocator(size, page_size=page, dtype=torch.float32, device="cpu", kvcache=cache, need_sort=False)


@pytest.mark.parametrize("page", [1, 4, 16])
def test_requests_grow_without_ever_sharing_a_slot(page: int) -> None:
    """Random extends and decodes of several requests: every position of every request keeps one slot of its own,
    positions of a page are consecutive slots of one page, and freeing returns exactly what was taken."""
    rng = random.Random(page)
    pool = make(64 * 16, page)
    held: list[list[int]] = [[] for _ in range(5)]
    for _ in range(60):
        decode = rng.random() < 0.5
        chosen = sorted(rng.sample(range(5), rng.randint(1, 5)))
        grow = [1 if decode else rng.randint(1, 9) for _ in chosen]
        before = torch.tensor([len(held[i]) for i in chosen])
        after = before + torch.tensor(grow)
        last = torch.tensor([held[i][-1] if held[i] else -1 for i in chosen])
        if decode:
            slots = pool.alloc_decode(after, after, last)
        else:
            slots = pool.alloc_extend(before, before, after, after, last, sum(grow))
        if slots is None:
            break
        taken = iter(slots.tolist())
        for i, count in zip(chosen, grow):
            held[i] += [next(taken) for _ in range(count)]
    everything = [slot for slots in held for slot in slots]
    assert len(everything) == len(set(everything)) > 60
    for slots in held:
        assert all(slot // page > 0 for slot in slots), "page 0 is the padding page"
        for position, slot in enumerate(slots):
            assert slot % page == position % page
            assert position % page == 0 or slot == slots[position - 1] + 1
    pages = sum(-(-len(slots) // page) for slots in held)
    assert pool.available_size() == 64 * 16 - pages * page
    for slots in held:
        if slots:
            pool.free(torch.tensor(slots))
    assert pool.available_size() == 64 * 16


def test_a_short_pool_gives_nothing_and_keeps_everything() -> None:
    pool = make(16, 4)
    zero, ten = torch.tensor([0, 0]), torch.tensor([10, 10])
    none = torch.tensor([-1, -1])
    assert pool.alloc_extend(zero, zero, ten, ten, none, 20) is None
    assert pool.available_size() == 16
    assert pool.alloc_extend(zero[:1], zero[:1], torch.tensor([16]), torch.tensor([16]), none[:1], 16) is not None
    one = torch.tensor([1])
    assert pool.alloc_decode(one, one, torch.tensor([-1])) is None


def test_a_row_never_overflows_into_the_next_one() -> None:
    """Upstream's slot writer has no bound: past the row it would overwrite the next request's slots."""
    table = torch.zeros((3, 8), dtype=torch.int32)
    rows, start = torch.tensor([1, 2]), torch.tensor([2, 0])
    assign_req_to_token_pool(rows, table, start, torch.tensor([5, 2]), torch.arange(10, 15), 2)
    assert table.tolist() == [[0] * 8, [0, 0, 10, 11, 12, 0, 0, 0], [13, 14, 0, 0, 0, 0, 0, 0]]
    with pytest.raises(RuntimeError, match="cannot hold position 8"):
        assign_req_to_token_pool(rows[:1], table, start[:1], torch.tensor([9]), torch.arange(7), 1)
    assert table[2].tolist() == [13, 14, 0, 0, 0, 0, 0, 0]
