from __future__ import annotations

import torch


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    query_begin: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
) -> None:
    # fp32 at least; fp64 if q is fp64, which tests use as the truth.
    precision = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // keys.shape[1]
    bounds = query_begin.tolist()
    for row, begin, end, context in zip(rows.tolist(), bounds[:-1], bounds[1:], context_lens.tolist(), strict=True):
        for token in range(begin, end):
            position = context - (end - token)
            first = max(position - window, 0) if window >= 0 else 0
            slots = req_to_token[row, first : position + 1].long()
            seen_keys = keys[slots].to(precision).repeat_interleave(group, dim=1)
            seen_values = values[slots].to(precision).repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,khd->hk", q[token].to(precision), seen_keys) * scale
            out[token] = torch.einsum("hk,khd->hd", scores.softmax(dim=1), seen_values)
