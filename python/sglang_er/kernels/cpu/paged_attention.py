from __future__ import annotations

import torch

from sglang_er.kernels.cpu.loader import library
from sglang_er.kernels.kv_shadow import KvShadow


def serves(
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
    *_: object,
) -> bool:
    """All but a shadow in fp8, which is for GPUs."""
    return shadow is None or shadow.format != "fp8"


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
    threads = torch.get_num_threads()
    parts: tuple[int | torch.Tensor | None, ...] = (0, None, None, None, None)
    if shadow is not None:
        parts = (shadow.bits, shadow.keys, shadow.values, shadow.key_scales, shadow.value_scales)
    library().paged_attention(
        q,
        keys,
        values,
        req_to_token,
        rows,
        query_begin,
        context_lens,
        scale,
        window,
        *parts,
        valid,
        exact_newest,
        out,
        threads,
    )
