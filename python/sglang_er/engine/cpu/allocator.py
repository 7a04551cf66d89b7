"""Paged KV-slot allocator for the CPU: upstream's bookkeeping with the two Triton kernels replaced by torch."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """Same contract as `PagedTokenToKVPoolAllocator`: None when the pool is short, nothing taken in that case."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for positions [prefix_lens, seq_lens) of every request, flat int64 [extend_num_tokens]."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self._ensure_pages(num_new_pages):
            return None
        slots = torch.empty((extend_num_tokens,), dtype=torch.int64)
        alloc_extend_naive(
            prefix_lens.to(torch.int64),
            seq_lens.to(torch.int64),
            last_loc.to(torch.int64),
            self.free_pages,
            slots,
            self.page_size,
            self.device,
        )
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot per request for its position seq_lens - 1, int64 [batch]."""
        needs_page = (seq_lens - 1) % self.page_size == 0
        num_new_pages = int(needs_page.sum())
        if not self._ensure_pages(num_new_pages):
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[needs_page] = self.free_pages[:num_new_pages] * self.page_size
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def _ensure_pages(self, count: int) -> bool:
        if count > len(self.free_pages):
            self.merge_and_sort_free()
        return count <= len(self.free_pages)
