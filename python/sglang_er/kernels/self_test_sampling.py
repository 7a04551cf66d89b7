"""The self-test's cases (`self_test.py`) of the ops that turn logits into tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_er.kernels.reference.choose_seeded import choose_seeded
from sglang_er.kernels.reference.draft_sample import draft_sample
from sglang_er.kernels.reference.sample_rows import sample_rows
from sglang_er.kernels.reference.softmax_rows import softmax_rows
from sglang_er.kernels.reference.verify_chain import verify_chain
from sglang_er.kernels.self_test_draw import Draw, Function, near, poisoned


def _softmax_rows(function: Function, draw: Draw) -> str | None:
    logits = draw.normal(3, 5003)
    temperatures = torch.tensor([0.5, 1.0, 1.7], device=draw.device)
    result, truth = (torch.empty(logits.shape, dtype=torch.float32, device=draw.device) for _ in range(2))
    function(logits, temperatures, poisoned(result))
    softmax_rows(logits, temperatures, truth)
    return near(result, truth)


def _sample_rows(function: Function, draw: Draw) -> str | None:
    weights = draw.normal(4, 3, 5003).float().relu().to(draw.dtype)
    subtract, offsets = weights[:, :2].flip(0).contiguous(), draw.ints([0, 1, 2, 0])
    for of, less, at in ((weights[:, 0].contiguous(), None, None), (weights, subtract, offsets)):
        coins = draw.coins(4)
        result, truth = (torch.empty(4, dtype=torch.int64, device=draw.device) for _ in range(2))
        function(of, less, at, coins, poisoned(result))
        sample_rows(of, less, at, coins, truth)
        if not torch.equal(result, truth):
            return f"drew {result.tolist()} in place of {truth.tolist()}"
    return None


def draft_sizes(device: str) -> tuple[int, int]:
    """Rows and vocabulary. On a GPU as many rows as make kernels take larger tiles, and tens of programs a row, which
    come in any order; on a CPU they follow each other, and small does."""
    return (9, 40003) if device.startswith("cuda") else (4, 1100)


def _draft_sample(function: Function, draw: Draw) -> str | None:
    """Without filters, with one, with all, each twice: the second call finds what the first one has left. Distinct
    logits where they cut, as equal ones may be cut otherwise."""
    rows, size = draft_sizes(draw.device)
    logits = torch.full((rows, size), -60.0, dtype=draw.dtype, device=draw.device)
    for row in logits:
        row[draw.permutation(size, torch.int64)[:200]] = torch.arange(200, device=draw.device).to(draw.dtype) / 16
    kinds = torch.arange(rows) % 4
    temperatures, top_ps, min_ps = (
        torch.tensor(values)[kinds].to(draw.device)
        for values in ([0.5, 1.0, 1.7, 3.0], [0.9, 0.3, 0.99, 0.97], [0.0, 0.7, 0.011, 0.0007])
    )
    filters = torch.tensor([1, 0, 20, 199], dtype=torch.int32)[kinds].to(draw.device), top_ps, min_ps
    for used in ((False,) * 3, (False, True, False), (True,) * 3):
        coins = draw.coins(rows)
        given = (column if use else None for column, use in zip(filters, used, strict=True))
        shared = (logits, temperatures, *given, coins)
        for _ in range(2):
            if found := _drafted(function, shared):
                return found
    return None


def _drafted(function: Function, shared: tuple[Any, ...]) -> str | None:
    logits, coins = shared[0], shared[-1]
    results, truths = (
        (torch.empty_like(coins, dtype=torch.int64), torch.empty_like(logits, dtype=torch.float32)) for _ in range(2)
    )
    function(*shared, poisoned(results[0]), poisoned(results[1]))
    arguments = (*shared, *truths)
    draft_sample(*arguments)
    if not torch.equal(results[1] > 0, truths[1] > 0):
        return f"keeps {(results[1] > 0).sum(-1).tolist()} tokens in place of {(truths[1] > 0).sum(-1).tolist()}"
    if found := near(results[1], truths[1]):
        return found
    if not torch.equal(results[0], truths[0]):
        return f"drew {results[0].tolist()} in place of {truths[0].tolist()}"
    return None


def _choose_seeded(function: Function, draw: Draw) -> str | None:
    logits, temperatures = draw.normal(6, 5003), torch.linspace(0.3, 1.7, 6, device=draw.device)
    seeds, positions = draw.ints([0, 42, 2**40 + 5, 2**62 + 7, 1, 2**31]), draw.ints([0, 7, 511, 1, 40000, 3])
    result, truth = (torch.empty(6, dtype=torch.int64, device=draw.device) for _ in range(2))
    function(logits, temperatures, seeds, positions, poisoned(result))
    choose_seeded(logits, temperatures, seeds, positions, truth)
    return None if torch.equal(result, truth) else f"chose {result.tolist()} in place of {truth.tolist()}"


def _verify_chain(function: Function, draw: Draw) -> str | None:
    p, q = (draw.normal(4, width, 5003).float().relu().to(draw.dtype) for width in (4, 3))
    drafts = _drafts_of(q)
    coins = draw.coins(16).view(4, 4)
    for accept in (coins[:, :3].contiguous(), torch.zeros_like(coins[:, :3])):  # some kept, all kept
        results, truths = (
            (torch.empty((4, 4), dtype=torch.int64, device=draw.device), draw.ints([0] * 4, torch.int32))
            for _ in range(2)
        )
        function(p, q, drafts, accept, coins[:, 3].contiguous(), poisoned(results[0]), poisoned(results[1]))
        verify_chain(p, q, drafts, accept, coins[:, 3].contiguous(), *truths)
        if not all(torch.equal(result, truth) for result, truth in zip(results, truths, strict=True)):
            return f"committed {results[0].tolist()} in place of {truths[0].tolist()}"
    return None


def _drafts_of(q: torch.Tensor) -> torch.Tensor:
    """A draft per row that q gives some weight: int64 [rows, drafts]."""
    return torch.stack([row.nonzero()[7 + place, 0] for rows in q for place, row in enumerate(rows)]).view(q.shape[:2])


CASES: dict[str, Callable[[Function, Draw], str | None]] = {
    "softmax_rows": _softmax_rows,
    "sample_rows": _sample_rows,
    "draft_sample": _draft_sample,
    "choose_seeded": _choose_seeded,
    "verify_chain": _verify_chain,
}
