"""A few real forwards at start-up: what `policy/seeding.py` asks to be timed.

The engine is idle and its KV pool empty. Rows of the slot table and slots are borrowed: what the forwards write there
belongs to nobody, and whoever gets a slot writes it before reading it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from sglang_er.engine import forward
from sglang_er.engine.sampler import StepSampler
from sglang_er.policy import seeding
from sglang_er.sampling.filters import FilterParams

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.engine.drafter import WrappedDrafter
    from sglang_er.engine.ranks import Ranks
    from sglang_er.engine.target_graphs import TargetGraphs


def time_forwards(
    runner: ModelRunner, drafter: WrappedDrafter, graphs: TargetGraphs, gamma_max: int, seconds: float, ranks: Ranks
) -> list[seeding.Timing]:
    """Plain, draft and verify forwards at rising batch sizes, as many as fit into `seconds` (of the first rank)."""

    def measure(kind: str, size: int, gamma: int) -> float:
        drafts = max(gamma, 1)
        with _borrowed_rows(runner, size, seeding.CONTEXT + drafts + 1) as rows:
            on_host = torch.full((size,), seeding.CONTEXT, dtype=torch.int64)
            chain = forward.make_chain(runner, rows, on_host.to(rows.device), drafts, on_host)
            return ranks.seconds(_seconds(runner, drafter, graphs, chain, kind))

    slots = runner.token_to_kv_pool_allocator.available_size()
    requests, longest = runner.req_to_token_pool.size, seeding.CONTEXT + min(seeding.GAMMA, gamma_max) + 1
    sizes = [size for size in seeding.SIZES if size <= requests and size * longest < slots]
    return seeding.time_forwards(measure, sizes, gamma_max, seconds)


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


def _seconds(
    runner: ModelRunner, drafter: WrappedDrafter, graphs: TargetGraphs, chain: forward.Chain, kind: str
) -> float:
    """Of one forward over this chain."""
    device, batch_size = chain.committed.device, chain.committed.shape[0]
    tokens = torch.zeros_like(chain.slots)
    run: Callable[[], object]
    if kind == "plain":  # the twin is switched off: the policy itself
        run = partial(forward.draft_logits, runner, chain, 0, tokens[:, 0])
    elif kind == "draft":
        run = partial(_draft, drafter, chain, tokens[:, 0])
    else:
        run = partial(runner.forward, forward.make_verify_batch(runner, chain, tokens))
    wait = torch.get_device_module(device).synchronize if device.type != "cpu" else lambda: None
    with graphs.verifying(tokens.shape[1], batch_size) if kind == "verify" else nullcontext():
        wait()
        begin = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - begin


def _draft(drafter: WrappedDrafter, chain: forward.Chain, bonus: torch.Tensor) -> None:
    """One token a request, sampled without filters as most are, where a whole pass is one function."""
    rows, device = chain.committed.shape[0], chain.committed.device
    one, zero = torch.ones(rows, device=device), torch.zeros(rows, device=device)
    params = FilterParams(one[:, None], one, one.to(torch.int32), zero, False, False, False)
    chain = chain.first(1)
    sampler, context = StepSampler.of(params, greedy=False, seeds=None), rows * seeding.CONTEXT
    if drafter.whole_pass(chain, bonus, sampler, context) is None:
        with drafter.draft_pass(chain):
            drafter.logits(chain, 0, bonus)
