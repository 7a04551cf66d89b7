from __future__ import annotations

import torch

from sglang_er.kernels.reference.sample_rows import sample_rows


def draft_sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor | None,
    top_ps: torch.Tensor | None,
    min_ps: torch.Tensor | None,
    coins: torch.Tensor,
    tokens: torch.Tensor,
    out: torch.Tensor,
) -> None:
    # fp32 at least; fp64 if the logits are fp64, which tests use as the truth.
    precision = torch.promote_types(logits.dtype, torch.float32)
    probs = torch.softmax(logits.to(precision) / temperatures[:, None], dim=-1)
    if not (top_ks is None and top_ps is None and min_ps is None):
        probs *= _kept(probs, top_ks, top_ps, min_ps)
        probs /= probs.sum(dim=-1, keepdim=True)
    out.copy_(probs)
    sample_rows(out, None, None, coins, tokens)


def _kept(
    probs: torch.Tensor, top_ks: torch.Tensor | None, top_ps: torch.Tensor | None, min_ps: torch.Tensor | None
) -> torch.Tensor:
    """Which tokens all filters keep, bool [R, V]: equal probabilities, equal answer."""
    ranked = probs.sort(dim=-1, descending=True).values
    # Every token by the first of those that are as likely: how many are likelier, and their mass.
    first = torch.searchsorted(-ranked, -probs).clamp_(max=probs.shape[1] - 1)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if top_ks is not None:
        keep &= (first < top_ks[:, None]) | (top_ks <= 0)[:, None]
    if top_ps is not None:
        mass = ranked.to(torch.float64).cumsum(dim=-1)
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1).gather(-1, first)
        keep &= (before <= top_ps[:, None] * mass[:, -1:]) | (top_ps >= 1)[:, None]
    if min_ps is not None:
        keep &= probs >= ranked[:, :1] * min_ps[:, None]
    return keep
