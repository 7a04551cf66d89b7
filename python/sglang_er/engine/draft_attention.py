"""Attention of the draft pass over SGLang's KV pool, from tensors alone: nothing is planned on the host, so a graph can
hold it. Decode only: one query token a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_er import kernels
from sglang_er.twin.kv_shadow import EXACT_NEWEST

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.twin.kv_shadow import ShadowPool


def window_of(radix: RadixAttention) -> int:
    """Sliding window in tokens before the query's own, -1 for full attention."""
    size = radix.sliding_window_size
    return -1 if size is None else int(size)


class DraftAttention(AttentionBackend):
    """`forward_batch` says who is where: req_pool_indices int64 [B], seq_lens int64 [B] with the new token counted,
    out_cache_loc [B]; all of them may be buffers that are filled anew before every replay."""

    def __init__(self, runner: ModelRunner, most_rows: int) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self._begins = torch.arange(most_rows + 1, dtype=torch.int64, device=runner.device)
        self._first_layer = int(runner.token_to_kv_pool.start_layer or 0)
        self.shadow: ShadowPool | None = None  # read in place of the pool, but for the newest tokens

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """There is none."""

    def forward_decode(self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache: bool = True):  # type: ignore[no-untyped-def]
        """q [B, heads * head_dim] -> [B, heads * v_head_dim]; K and V are stored first."""
        if layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY:
            raise RuntimeError("sglang-er: encoder and cross attention are not supported")
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        rows, shadow = forward_batch.req_pool_indices, self.shadow
        out = kernels.paged_attention(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            rows,
            self._begins[: rows.shape[0] + 1],
            forward_batch.seq_lens,
            scale=layer.scaling,
            window=window_of(layer),
            shadow=None if shadow is None else shadow.layers[layer.layer_id - self._first_layer],
            valid=None if shadow is None else shadow.valid,
            exact_newest=EXACT_NEWEST,
        )
        return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)
