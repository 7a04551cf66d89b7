from __future__ import annotations

import torch

from sglang_er.kernels.cpu.sample_rows import sample_rows
from sglang_er.kernels.cpu.softmax_rows import softmax_rows
from sglang_er.kernels.ranked_filters import filter_ranked


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
    if top_ks is None and top_ps is None and min_ps is None:
        softmax_rows(logits, temperatures, out)
    else:
        if top_ks is not None:
            top_ks = torch.where(top_ks > 0, top_ks, logits.shape[1])
        probs = torch.softmax(logits.float() / temperatures[:, None], dim=-1)
        filter_ranked(probs, top_ks, top_ps, min_ps, out)
    sample_rows(out, None, None, coins, tokens)
