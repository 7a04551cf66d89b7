"""Attention over SGLang's KV pool on a CPU: prefill, chunked prefill, decode and verify.

One kernel does all of them. What follows below is the same in torch, for `executor=wrapped`, `kernels=reference` and
KV dtypes that the kernel does not read. There decode and verify are one case: n query tokens per request (n = 1 or
gamma + 1) at the end of a context that already holds their keys. They run as one padded batch; the index matrix and
the mask are made once per forward and shared by all layers. Query heads of a KV head are folded into the query axis,
so grouped-query attention copies no KV. Extends (prefill) run per request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

from sglang_er import kernels
from sglang_er.engine.cpu import executor
from sglang_er.engine.draft_attention import window_of
from sglang_er.kernels.base import WEIGHT_DTYPES

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass
class KernelPlan:
    """Whose tokens are where: rows, context_lens int64 [B], query_begin int64 [B + 1]."""

    rows: torch.Tensor
    query_begin: torch.Tensor
    context_lens: torch.Tensor


@dataclass
class BatchPlan:
    """Decode or verify: `slots` int64 [B, L] (padding repeats a valid slot), `last` int64 [B, n] = the last
    context position that each query may read, `masks` by sliding window (None = full attention)."""

    num_queries: int
    slots: torch.Tensor
    last: torch.Tensor
    uniform: bool
    masks: dict[int, torch.Tensor | None] = field(default_factory=dict)


@dataclass
class ExtendPlan:
    """Prefill: per request (first query row, one past it, prefix length, slots int64 [prefix + new])."""

    requests: list[tuple[int, int, int, torch.Tensor]]


class CpuAttentionBackend(AttentionBackend):
    """Torch SDPA over the paged KV pool; see the module docstring for the plan."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        self.device = model_runner.device
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self._forward_batch: ForwardBatch | None = None
        self._kernel_plan: KernelPlan | None = None
        self._plan: BatchPlan | ExtendPlan | None = None

    def support_triton(self) -> bool:
        return False

    # -- planning ------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        # The plan is made at the first attention layer: the native executor has its own and needs none.
        self._forward_batch = forward_batch
        self._kernel_plan = None
        self._plan = None

    @property
    def kernel_plan(self) -> KernelPlan:
        if self._kernel_plan is None:
            assert self._forward_batch is not None
            self._kernel_plan = self._make_kernel_plan(self._forward_batch)
        return self._kernel_plan

    def _make_kernel_plan(self, forward_batch: ForwardBatch) -> KernelPlan:
        mode = forward_batch.forward_mode
        if mode.is_target_verify():
            width = forward_batch.spec_info.num_tokens_per_req
            context_lens = forward_batch.seq_lens.to(torch.int64) + width
            new = torch.full_like(context_lens, width)
        elif mode.is_decode():
            context_lens = forward_batch.seq_lens.to(torch.int64)
            new = torch.ones_like(context_lens)
        else:
            new = forward_batch.extend_seq_lens.to(torch.int64)
            context_lens = forward_batch.extend_prefix_lens.to(torch.int64) + new
        begins = torch.cat([new.new_zeros(1), new.cumsum(0)])
        return KernelPlan(forward_batch.req_pool_indices.to(torch.int64), begins, context_lens)

    @property
    def plan(self) -> BatchPlan | ExtendPlan:
        if self._plan is None:
            assert self._forward_batch is not None
            self._plan = self._make_plan(self._forward_batch)
        return self._plan

    def _make_plan(self, forward_batch: ForwardBatch) -> BatchPlan | ExtendPlan:
        mode = forward_batch.forward_mode
        if mode.is_target_verify():
            width = forward_batch.spec_info.num_tokens_per_req
            return self._plan_batch(forward_batch, forward_batch.seq_lens + width, width)
        if mode.is_decode():
            return self._plan_batch(forward_batch, forward_batch.seq_lens, 1)
        return self._plan_extend(forward_batch)

    def _plan_batch(self, forward_batch: ForwardBatch, total_lens: torch.Tensor, width: int) -> BatchPlan:
        total = total_lens.to(torch.int64)
        longest = int(total.max())
        positions = torch.arange(longest)
        # Padding columns read the request's first slot: valid memory, masked out below.
        columns = torch.where(positions < total[:, None], positions, 0)
        slots = self.req_to_token[forward_batch.req_pool_indices.to(torch.int64)[:, None], columns]
        last = total[:, None] - width + torch.arange(width)
        uniform = width == 1 and bool((total == longest).all())
        return BatchPlan(width, slots.to(torch.int64), last, uniform)

    def _plan_extend(self, forward_batch: ForwardBatch) -> ExtendPlan:
        rows = forward_batch.req_pool_indices.tolist()
        requests, start = [], 0
        for row, prefix, new in zip(
            rows, forward_batch.extend_prefix_lens.tolist(), forward_batch.extend_seq_lens.tolist(), strict=True
        ):
            slots = self.req_to_token[row, : prefix + new].to(torch.int64)
            requests.append((start, start + new, prefix, slots))
            start += new
        return ExtendPlan(requests)

    # -- execution -----------------------------------------------------------------------------------------------

    def forward_decode(self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache: bool = True):  # type: ignore[no-untyped-def]
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache: bool = True):  # type: ignore[no-untyped-def]
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        """q [tokens, heads * head_dim] -> [tokens, heads * v_head_dim]; K and V are stored first."""
        if layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY:
            raise RuntimeError("sglang-er: encoder and cross attention are not supported on the CPU platform")
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if executor.own_kernels and keys.dtype in WEIGHT_DTYPES and query.dtype in WEIGHT_DTYPES:
            where = self.kernel_plan
            out = kernels.paged_attention(
                query,
                keys,
                values,
                self.req_to_token,
                where.rows,
                where.query_begin,
                where.context_lens,
                scale=layer.scaling,
                window=window_of(layer),
            )
            return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)
        plan = self.plan
        if isinstance(plan, BatchPlan):
            out = self._attend_batch(query, keys, values, layer, plan)
        else:
            out = self._attend_extend(query, keys, values, layer, plan)
        return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _attend_batch(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: RadixAttention, plan: BatchPlan
    ) -> torch.Tensor:
        batch, width = plan.last.shape
        kv_heads, dim = layer.tp_k_head_num, layer.qk_head_dim
        group = layer.tp_q_head_num // kv_heads
        folded = query.view(batch, width, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
        folded = folded.reshape(batch, kv_heads, group * width, dim)
        out = scaled_dot_product_attention(
            folded,
            keys[plan.slots].to(query.dtype).transpose(1, 2),
            values[plan.slots].to(query.dtype).transpose(1, 2),
            attn_mask=self._batch_mask(plan, window_of(layer), group),
            scale=layer.scaling,
        )
        out = out.view(batch, kv_heads, group, width, layer.v_head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * width, layer.tp_q_head_num, layer.v_head_dim)

    @staticmethod
    def _batch_mask(plan: BatchPlan, window: int, group: int) -> torch.Tensor | None:
        """Bool [B, 1, group * n, L]; None when every query may read every column."""
        if plan.uniform and window < 0:
            return None
        # The fold puts heads of one group next to each other, each with all n queries.
        key = window * 1024 + group
        if key not in plan.masks:
            columns = torch.arange(plan.slots.shape[1])
            allowed = columns <= plan.last[:, :, None]
            if window >= 0:
                allowed &= columns >= plan.last[:, :, None] - window
            plan.masks[key] = allowed.repeat(1, group, 1)[:, None]
        return plan.masks[key]

    def _attend_extend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: RadixAttention, plan: ExtendPlan
    ) -> torch.Tensor:
        out = query.new_empty(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        window = window_of(layer)
        for start, end, prefix, slots in plan.requests:
            if end == start:
                continue
            mask = None
            if prefix or window >= 0:
                columns = torch.arange(slots.numel())
                last = prefix + torch.arange(end - start)[:, None]
                mask = columns <= last
                if window >= 0:
                    mask &= columns >= last - window
            attended = scaled_dot_product_attention(
                query[start:end].transpose(0, 1)[None],
                keys[slots].to(query.dtype).transpose(0, 1)[None],
                values[slots].to(query.dtype).transpose(0, 1)[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=layer.scaling,
                enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            )
            out[start:end] = attended[0].transpose(0, 1)
        return out


def create_cpu_attention_backend(model_runner: ModelRunner) -> CpuAttentionBackend:
    """Factory for SGLang's attention registry."""
    if getattr(model_runner, "use_mla_backend", False):
        raise RuntimeError("sglang-er: MLA models are not supported on the CPU platform; use a GQA/MHA model")
    return CpuAttentionBackend(model_runner)
