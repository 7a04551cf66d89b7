"""Drawing drafts: the token, and the distribution that it was drawn from."""

from __future__ import annotations

import torch

from sglang_er import kernels
from sglang_er.sampling.filters import FilterParams


def draft_sample(
    logits: torch.Tensor,
    params: FilterParams,
    out: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row of logits [R, V] -> tokens int64 [R], q fp32 [R, V], which is `out` if given.

    q is exactly what the tokens were drawn from, and so any verification of them is exact. What lies on a boundary of a
    filter may be treated otherwise than in `filtered_probs` (`kernels.draft_sample`).
    """
    coins = torch.rand(logits.shape[:1], dtype=torch.float64, device=logits.device, generator=generator)
    return kernels.draft_sample(
        logits,
        params.temperatures.flatten(),
        coins,
        top_ks=params.top_ks if params.need_top_k else None,
        top_ps=params.top_ps if params.need_top_p else None,
        min_ps=params.min_ps if params.need_min_p else None,
        out=out,
    )
