"""Top-k, top-p and min-p by rank, in plain torch: SGLang's own arithmetic, which decides a boundary by the last bit."""

from __future__ import annotations

import torch


def filter_ranked(
    probs: torch.Tensor,
    top_ks: torch.Tensor | None,
    top_ps: torch.Tensor | None,
    min_ps: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probabilities [R, V] -> those that the filters [R] keep, normalized, 0 elsewhere. None: no row has that filter.

    Of equal probabilities at a boundary the first in the order of a sort are kept. `out` [R, V] may not be `probs`.
    """
    ranked, order = probs.sort(dim=-1, descending=True)
    before = ranked.cumsum(dim=-1) - ranked
    # SGLang asks this of every row of a batch with a filter: rounding may bring the mass above a top_p of 1.
    keep = before <= (1.0 if top_ps is None else top_ps[:, None])
    if top_ks is not None:
        keep &= torch.arange(ranked.shape[-1], device=ranked.device) < top_ks[:, None]
    if min_ps is not None:
        keep &= ranked >= ranked[:, :1] * min_ps[:, None]
    ranked = torch.where(keep, ranked, 0.0)
    ranked /= ranked.sum(dim=-1, keepdim=True)
    return (torch.zeros_like(probs) if out is None else out.zero_()).scatter_(-1, order, ranked)
