"""What section `bench_kernels` times of sampling: calls of an op on memory that rotates, by label."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from sglang_er import kernels
from sglang_er.kernels import registry
from sglang_er.kernels.chain_ops import verify_chain
from sglang_er.kernels.ranked_filters import filter_ranked

from . import clock
from .bench_works import TORCH, Work

GAMMA = 3
# Ops that replace several of torch.
COMPOSED = ("draft_sample", "choose_seeded")


def softmax(sizes: Sequence[tuple[int, int]], name: str, device: str) -> dict[str, Work]:
    found = {}
    for rows, cols in sizes:
        logits = torch.randn(rows, cols, device=device)
        out, warmth = torch.empty_like(logits), torch.ones(rows, device=device)
        copies = [logits.clone() for _ in range(clock.copies_for(logits.nbytes, device))]
        runs = [partial(kernels.softmax_rows, c, warmth, out, implementation=name) for c in copies]
        found[f"{rows}x{cols}"] = Work(runs, logits.nbytes + out.nbytes)
    return found


def sample(sizes: Sequence[tuple[int, int]], name: str, device: str) -> dict[str, Work]:
    found = {}
    for rows, cols in sizes:
        weights = torch.randn(rows, cols, device=device).mul_(3).softmax(-1)
        coins = torch.rand(rows, dtype=torch.float64, device=device)
        copies = [weights.clone() for _ in range(clock.copies_for(weights.nbytes, device))]
        runs = [partial(kernels.sample_rows, c, coins, implementation=name) for c in copies]
        found[f"{rows}x{cols}"] = Work(runs, weights.nbytes)
    return found


def chain(sizes: Sequence[tuple[int, int]], name: str, device: str) -> dict[str, Work]:
    """At worst a row of p and one of q are read; the drafts' own probabilities are single values."""
    found = {}
    for rows, cols in sizes:
        p = torch.randn(rows, GAMMA + 1, cols, device=device).mul_(3).softmax(-1)
        q = p[:, :GAMMA].flip(0).contiguous()
        drafts = q.argmax(-1)
        coins = torch.rand(rows, GAMMA + 1, dtype=torch.float64, device=device)
        accept, resample = coins[:, :GAMMA], coins[:, GAMMA].contiguous()
        copies = [(p.clone(), q.clone()) for _ in range(clock.copies_for(p.nbytes + q.nbytes, device))]
        runs = [partial(verify_chain, a, b, drafts, accept, resample, implementation=name) for a, b in copies]
        found[f"{rows}x{cols}"] = Work(runs, 2 * rows * cols * p.element_size())
    return found


def draft(sizes: Sequence[tuple[int, int]], name: str, device: str) -> dict[str, Work]:
    """Bytes of reading the logits and writing q once; torch: softmax, sort, sums and a draw, as on a CPU."""
    found = {}
    for rows, cols in sizes:
        logits = torch.randn(rows, cols, device=device).mul_(3)
        out, warmth = torch.empty_like(logits), torch.ones(rows, device=device)
        coins = torch.rand(rows, dtype=torch.float64, device=device)
        copies = [logits.clone() for _ in range(clock.copies_for(logits.nbytes, device))]
        k, p, m = (torch.full((rows,), value, device=device) for value in (50, 0.95, 0.02))
        for label, filters in (
            ("", {}),
            (" top-k", {"top_ks": k.int()}),
            (" top-p", {"top_ps": p}),
            (" all", {"top_ks": k.int(), "top_ps": p, "min_ps": m}),
        ):
            if name == TORCH:
                runs: list[clock.Run] = [partial(_composed, c, warmth, coins, **filters) for c in copies]
            else:
                call = partial(kernels.draft_sample, temperatures=warmth, coins=coins, **filters, out=out)
                runs = [partial(call, c, implementation=name) for c in copies]
            found[f"{rows}x{cols}{label}"] = Work(runs, logits.nbytes + out.nbytes)
    return found


def _composed(
    logits: torch.Tensor, temperatures: torch.Tensor, coins: torch.Tensor, **filters: torch.Tensor
) -> torch.Tensor:
    probs = torch.softmax(logits / temperatures[:, None], dim=-1)
    if filters:
        probs = filter_ranked(probs, *(filters.get(key) for key in ("top_ks", "top_ps", "min_ps")))
    return kernels.sample_rows(probs, coins, implementation=registry.REFERENCE)


def choose(sizes: Sequence[tuple[int, int]], name: str, device: str) -> dict[str, Work]:
    """`torch`: the reference, which is SGLang's function but for a compiler."""
    found = {}
    for rows, cols in sizes:
        logits = torch.randn(rows, cols, device=device).mul_(3)
        warmth, places = torch.ones(rows, device=device), torch.arange(rows, device=device)
        copies = [logits.clone() for _ in range(clock.copies_for(logits.nbytes, device))]
        call = partial(kernels.choose_seeded, temperatures=warmth, seeds=places + 2**33, positions=places)
        runs: list[clock.Run] = [
            partial(call, c, implementation=registry.REFERENCE if name == TORCH else name) for c in copies
        ]
        found[f"{rows}x{cols}"] = Work(runs, logits.nbytes)
    return found
