from __future__ import annotations

import torch

from sglang_er.kernels.cpu.loader import library


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
    threads = torch.get_num_threads()
    library().paged_attention(
        q, keys, values, req_to_token, rows, query_begin, context_lens, scale, window, out, threads
    )
