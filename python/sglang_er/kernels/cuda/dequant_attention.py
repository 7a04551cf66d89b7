"""``paged_attention`` for decoding from an int4 shadow; csrc/cuda/dequant_attention.cu says how."""

from __future__ import annotations

import torch

from sglang_er.kernels.cuda import loader
from sglang_er.kernels.kv_shadow import KvShadow

HEAD_DIMS = (64, 128)
MAX_GROUP = 16
MAX_TOKENS = 1024
MIN_CHUNK_TOKENS = 512
"""This and the next as in csrc/include/sglang_er/split_schedule.h; the kernel refuses a workspace of other size."""
MAX_CHUNKS = 32
_LOAD_BYTES = 16


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
    valid: torch.Tensor | None,
    exact_newest: int,
    out: torch.Tensor,
) -> bool:
    """Whether this kernel computes the call, from shapes and dtypes alone.

    It is right for any number of query tokens, but reads the context again for each, so one a request is asked for.
    """
    bf16 = all(t.dtype == torch.bfloat16 for t in (q, keys, values))
    aligned = all(t.data_ptr() % _LOAD_BYTES == 0 and t.stride(0) % 8 == 0 for t in (q, keys, values, out))
    return (
        loader.serves("dequant_attention", q.device)
        and shadow is not None
        and shadow.format == "int4"
        and valid is not None
        and bf16
        and aligned
        and out.dtype in (torch.bfloat16, torch.float32)
        and window < 0
        and 0 < q.shape[0] == rows.shape[0] <= MAX_TOKENS
        and keys.shape[2] == values.shape[2]
        and keys.shape[2] in HEAD_DIMS
        and q.shape[1] // keys.shape[1] <= MAX_GROUP
        and 0 < req_to_token.shape[1] <= 1 << 30
    )


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
    """For calls that ``serves`` accepts. The table and the context lengths are trusted: they stay on the device."""
    if shadow is None or window >= 0:
        raise ValueError("dequant_attention needs a shadow and no window")
    tokens, heads, dim = q.shape
    chunks = min(-(-req_to_token.shape[1] // MIN_CHUNK_TOKENS), MAX_CHUNKS)
    # From the caching allocator each time: what a captured graph uses then belongs to that graph.
    partial_values = q.new_empty((tokens, heads, chunks, dim), dtype=torch.float32)
    partial_sums = q.new_empty((tokens, heads, chunks, 2), dtype=torch.float32)
    loader.module("dequant_attention", q.device).dequant_attention(
        q,
        keys,
        values,
        req_to_token,
        rows,
        query_begin,
        context_lens,
        scale,
        shadow.keys,
        shadow.values,
        shadow.key_scales,
        shadow.value_scales,
        valid,
        exact_newest,
        partial_values,
        partial_sums,
        out,
    )
