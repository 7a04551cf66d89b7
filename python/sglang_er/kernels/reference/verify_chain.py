from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_er.kernels.reference.sample_rows import sample_rows


def verify_chain(
    p: torch.Tensor,
    q: torch.Tensor,
    drafts: torch.Tensor,
    accept_coins: torch.Tensor,
    resample_coins: torch.Tensor,
    tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    draw: Callable[..., None] = sample_rows,
) -> None:
    """`draw`: who computes `sample_rows`."""
    gamma = drafts.shape[1]
    index = drafts[..., None]
    p_drafts = p[:, :gamma].gather(-1, index).squeeze(-1).to(torch.float64)
    q_drafts = q.gather(-1, index).squeeze(-1).to(torch.float64)
    accepted = (accept_coins * q_drafts < p_drafts).to(torch.int64).cumprod(dim=1).sum(dim=1)
    last = torch.empty_like(accepted)
    draw(p, q, accepted, resample_coins, last)
    tokens.copy_(torch.cat([drafts, drafts[:, :1]], dim=1))
    tokens.scatter_(1, accepted[:, None], last[:, None])
    accept_lens.copy_(accepted + 1)
