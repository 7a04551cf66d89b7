from __future__ import annotations

import torch

from sglang_er.kernels.kv_shadow import KvShadow
from sglang_er.kernels.reference.kv_shadow_store import dequantize_keys, dequantize_values, rotate


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
    shadow: KvShadow | None,
    valid: torch.Tensor | None,
    exact_newest: int,
    out: torch.Tensor,
) -> None:
    # fp32 at least; fp64 if q is fp64, which tests use as the truth.
    precision = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // keys.shape[1]
    if shadow is not None:
        shadow_keys, shadow_values = dequantize_keys(shadow, precision), dequantize_values(shadow, precision)
    bounds = query_begin.tolist()
    for row, begin, end, context in zip(rows.tolist(), bounds[:-1], bounds[1:], context_lens.tolist(), strict=True):
        for token in range(begin, end):
            position = context - (end - token)
            first = max(position - window, 0) if window >= 0 else 0
            slots = req_to_token[row, first : position + 1].long()
            seen_keys, seen_values = keys[slots].to(precision), values[slots].to(precision)
            query = q[token].to(precision)
            scores = torch.einsum("hd,khd->hk", query, seen_keys.repeat_interleave(group, dim=1))
            if shadow is not None and valid is not None:
                old = torch.arange(first, position + 1, device=q.device) < context - exact_newest
                quantized = old & valid[slots].bool()
                query = rotate(query) if shadow.format == "int4" else query
                approximate = torch.einsum("hd,khd->hk", query, shadow_keys[slots].repeat_interleave(group, dim=1))
                scores = torch.where(quantized, approximate, scores)
                seen_values = torch.where(quantized[:, None, None], shadow_values[slots], seen_values)
            weights = (scores * scale).softmax(dim=1)
            out[token] = torch.einsum("hk,khd->hd", weights, seen_values.repeat_interleave(group, dim=1))
