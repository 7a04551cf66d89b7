"""A few real forwards at start-up, so that the first decisions rest on this machine and this model.

The engine is idle and its KV pool empty. Rows of the slot table and slots are borrowed: what the forwards write there
belongs to nobody, and whoever gets a slot writes it before reading it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sglang_er.engine import forward
from sglang_er.policy.cost_features import Step

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.engine.drafter import WrappedDrafter

SIZES = (1, 4, 16, 64)
GAMMA = 3
_CONTEXT = 64
_REPEATS = 2
_GROWTH = 4.0  # a size takes at most so many times the seconds of the one before it

# kind, step, gamma, seconds: what policy.cost_model.seed takes
Timing = tuple[str, Step, int, float]


def time_forwards(runner: ModelRunner, drafter: WrappedDrafter, gamma_max: int, seconds: float) -> list[Timing]:
    """Plain, draft and verify forwards at rising batch sizes, as many as fit into `seconds`."""
    gamma = min(GAMMA, gamma_max)
    timings: list[Timing] = []
    for size in _sizes_that_fit(runner, gamma):
        begin = time.perf_counter()
        with _borrowed_rows(runner, size, _CONTEXT + gamma + 1) as rows:
            committed = torch.full((size,), _CONTEXT, dtype=torch.int64, device=rows.device)
            chain = forward.make_chain(runner, rows, committed, gamma)
            timings += _timed(runner, drafter, chain, gamma)
        spent = time.perf_counter() - begin
        seconds -= spent
        if seconds < _GROWTH * spent:
            break
    return timings


def _sizes_that_fit(runner: ModelRunner, gamma: int) -> list[int]:
    slots = runner.token_to_kv_pool_allocator.available_size()
    requests = runner.req_to_token_pool.size
    return [size for size in SIZES if size <= requests and size * (_CONTEXT + gamma + 1) < slots]


@contextmanager
def _borrowed_rows(runner: ModelRunner, size: int, length: int) -> Iterator[torch.Tensor]:
    """Indices of `size` rows of the slot table that hold `length` slots each, all different."""
    table = runner.req_to_token_pool.req_to_token
    rows = torch.arange(size, dtype=torch.int64, device=table.device)
    before = table[:size, :length].clone()
    # Slot 0 takes what padding writes.
    table[:size, :length] = torch.arange(1, size * length + 1, dtype=table.dtype, device=table.device).view(size, -1)
    try:
        yield rows
    finally:
        table[:size, :length] = before


def _timed(runner: ModelRunner, drafter: WrappedDrafter, chain: forward.Chain, gamma: int) -> Iterator[Timing]:
    size = len(chain.committed)
    step = Step(size, size * _CONTEXT)
    tokens = torch.zeros((size, gamma + 1), dtype=torch.int64, device=chain.committed.device)

    def plain() -> None:
        forward.draft_logits(runner, chain, 0, tokens[:, 0])  # the twin is switched off: the policy itself

    def draft() -> None:
        with drafter.draft_pass(chain):
            drafter.logits(chain, 0, tokens[:, 0])

    def verify() -> None:
        runner.forward(forward.make_verify_batch(chain, tokens, runner.spec_algorithm))

    for kind, run, drafted in (("plain", plain, 0), ("draft", draft, 0), ("verify", verify, gamma)):
        run()  # makes what is made at the first call
        for _ in range(_REPEATS):
            yield kind, step, drafted, _seconds(run, chain.committed.device)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter() - begin
