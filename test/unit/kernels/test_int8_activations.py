"""Which of two ops a draft's product is: always int8 on a CPU, on a GPU by measured times, else from 17 rows on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.on_gpu import on_gpu

from sglang_er.kernels import PackedWeight, int8_pays, registry
from sglang_er.kernels.cuda import loader
from sglang_er.kernels.cuda.specs import arch_of
from sglang_er.kernels.dispatch_table import DispatchTable
from sglang_er.kernels.int8_activations import FEWEST_ROWS


def rows(count: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return on_gpu(torch.zeros(count, 256, dtype=dtype))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Its CUDA kernels are named, and are taken to have passed their self-tests."""
    monkeypatch.setenv(registry.ENVIRONMENT, "cuda,reference")
    monkeypatch.setattr(loader, "arch", lambda device: arch_of((9, 0)))
    monkeypatch.setattr(registry, "_works", lambda *_: True)
    caches = registry.candidates, registry._least_time
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def weight(group: int = 128) -> PackedWeight:
    return PackedWeight.empty(4096, 256, group)


def test_a_cpu_always_rounds():
    assert int8_pays(torch.zeros(1, 256), weight(32))


def test_a_gpu_whose_times_nobody_knows_rounds_many_rows(hopper: pytest.MonkeyPatch):
    assert [int8_pays(rows(count), weight()) for count in (1, FEWEST_ROWS - 1, FEWEST_ROWS, 256)] == [
        False,
        False,
        True,
        True,
    ]


def test_not_where_plain_torch_would_compute(hopper: pytest.MonkeyPatch):
    """Other groups, other types, more rows than the kernel takes."""
    assert not int8_pays(rows(FEWEST_ROWS), weight(64))
    assert not int8_pays(rows(FEWEST_ROWS, torch.float32), weight())
    assert not int8_pays(rows(300), weight())


def test_measured_times_decide(hopper: pytest.MonkeyPatch):
    """Near the sizes that were measured; elsewhere the number of rows does."""
    times = {
        "w4a16_linear": {(8, 4096, 256): {"cuda": 5.0}, (128, 4096, 256): {"cuda": 9.0, "triton": 1.0}},
        "w4a8_linear": {(8, 4096, 256): {"cuda": 4.0}, (128, 4096, 256): {"cuda": 10.0}},
    }
    ops = {op: {"group 128": cells} for op, cells in times.items()}
    hopper.setattr(registry, "_table", DispatchTable("GPU", "", "bfloat16", "abc", "2026-12-01", ops))
    found = {count: int8_pays(rows(count), weight()) for count in (1, 7, 8, 100, 128, 256)}
    assert found == {1: False, 7: True, 8: True, 100: False, 128: False, 256: True}
    # Triton is not named here, or int8 would lose by more.
    assert registry.least_time("w4a16_linear", "cuda", torch.bfloat16, rows(128), weight()) == 9.0
    assert registry.least_time("w4a16_linear", "cuda", torch.float16, rows(128), weight()) is None
