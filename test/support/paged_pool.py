"""Random attention problems over a paged KV pool whose unused parts are poisoned with NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class PagedPool:
    """The tensor arguments of ``kernels.paged_attention``."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    req_to_token: torch.Tensor
    rows: torch.Tensor
    query_begin: torch.Tensor
    context_lens: torch.Tensor

    def args(self) -> tuple[torch.Tensor, ...]:
        return (
            self.q,
            self.keys,
            self.values,
            self.req_to_token,
            self.rows,
            self.query_begin,
            self.context_lens,
        )

    def double(self) -> PagedPool:
        return replace(self, q=self.q.double())

    def request(self, index: int, queries: int | None = None, context: int | None = None) -> PagedPool:
        """One request alone: its first ``context`` tokens, of which the last ``queries`` are query tokens."""
        begin, end = self.query_begin[index : index + 2].tolist()
        whole = int(self.context_lens[index])
        context = whole if context is None else context
        end -= whole - context
        begin = begin if queries is None else end - queries
        return replace(
            self,
            q=self.q[begin:end],
            rows=self.rows[index : index + 1],
            query_begin=torch.tensor([0, end - begin]),
            context_lens=torch.tensor([context]),
        )

    def slots(self, index: int) -> torch.Tensor:
        return self.req_to_token[self.rows[index], : self.context_lens[index]].long()


def random_pool(
    generator: torch.Generator,
    requests: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    q_dtype: torch.dtype = torch.float32,
    page_size: int = 1,
    window: int = -1,
    strided: bool = False,
) -> PagedPool:
    """``requests``: (context length, query tokens) each. Slots lie in pages in random order; slots that no token sees
    are NaN, and so are the table's unused entries, as far as an integer can be: they are outside the pool."""
    value_dim = value_dim or head_dim
    pages = [-(-context // page_size) for context, _ in requests]
    slots = (sum(pages) + 3) * page_size
    order = torch.randperm(slots // page_size, generator=generator)
    table = torch.full((len(requests) + 2, max(c for c, _ in requests) + 5), 2**31 - 1, dtype=torch.int32)
    rows = torch.randperm(len(requests) + 2, generator=generator)[: len(requests)]
    seen = torch.zeros(slots, dtype=torch.bool)
    used = 0
    for row, count, (context, queries) in zip(rows.tolist(), pages, requests, strict=True):
        own = order[used : used + count, None] * page_size + torch.arange(page_size)
        used += count
        first = 0 if window < 0 else max(context - queries - window, 0)
        own = own.flatten()[:context]
        table[row, first:context] = own[first:].to(torch.int32)
        if queries:
            seen[own[first:]] = True
    query_begin = torch.tensor([0, *[queries for _, queries in requests]]).cumsum(0)

    def rows_of(count: int, heads: int, dim: int) -> torch.Tensor:
        wide = torch.full((count, heads * dim + (24 if strided else 0)), float("nan"))
        wide[:, : heads * dim] = torch.randn(count, heads * dim, generator=generator)
        return wide

    def view(wide: torch.Tensor, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        return wide.to(dtype)[:, : heads * dim].unflatten(1, (heads, dim))

    pool = []
    for dim in (head_dim, value_dim):
        wide = rows_of(slots, kv_heads, dim)
        wide[~seen] = float("nan")
        pool.append(view(wide, kv_heads, dim, dtype))
    q = view(rows_of(int(query_begin[-1]), heads, head_dim), heads, head_dim, q_dtype)
    context_lens = torch.tensor([context for context, _ in requests])
    return PagedPool(q, pool[0], pool[1], table, rows, query_begin, context_lens)
