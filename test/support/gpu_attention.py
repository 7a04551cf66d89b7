"""SGLang's GPU attention backends without a GPU: their own Python, all that they plan, with the kernels in plain torch.

`install_fa3` and `install_flashinfer` are hooks for a real server on a CPU that runs SGLang's model code
(`SGLANG_ER_TEST_HOOK=support.gpu_attention:install_fa3`, `--er-executor wrapped`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal; q [n, heads, dim] are the last n tokens of keys and values [length, KV heads, dim]."""
    count, length = len(q), len(keys)
    sees = torch.arange(length) <= torch.arange(length - count, length)[:, None]
    by_head = [tensor.transpose(0, 1)[None] for tensor in (q, keys, values)]
    return scaled_dot_product_attention(*by_head, attn_mask=sees, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@contextmanager
def pretended(*modules: ModuleType) -> Iterator[None]:
    """Within it they can be imported; afterwards they are not installed, as before."""
    sys.modules |= {module.__name__: module for module in modules}
    try:
        yield
    finally:
        for module in modules:
            del sys.modules[module.__name__]


# -- FlashAttention 3 ------------------------------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    **_: Any,
) -> torch.Tensor:
    """q [tokens, heads, dim]; caches [pages, page size, KV heads, dim]; page_table int32 [B, pages]."""
    assert causal and window_size == (-1, -1)
    out, begins = torch.full_like(q, float("nan")), cu_seqlens_q.tolist()
    for request, length in enumerate(cache_seqlens.tolist()):
        begin, end = begins[request], begins[request + 1]
        pages = page_table[request, : -(-length // k_cache.shape[1])].long()
        keys, values = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        out[begin:end] = attend(q[begin:end], keys, values, softmax_scale)
    return out


def fa3_backend() -> type:
    """SGLang's FlashAttentionBackend. Its kernels' package is imported by name, and called by nobody here."""
    package, kernels = ModuleType("sgl_kernel"), ModuleType("sgl_kernel.flash_attn")
    package.merge_state_v2 = None  # type: ignore[attr-defined]
    kernels.flash_attn_with_kvcache = kernels.flash_attn_varlen_func = None  # type: ignore[attr-defined]
    kernels.get_scheduler_metadata = lambda **_: None  # type: ignore[attr-defined]
    with pretended(package, kernels):
        from sglang.srt.layers.attention import flashattention_backend

    flashattention_backend.flash_attn_with_kvcache = flash_attn_with_kvcache

    class Backend(flashattention_backend.FlashAttentionBackend):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with pretended(package, kernels):
                super().__init__(*args, **kwargs)

    return Backend


# -- FlashInfer ------------------------------------------------------------------------------------------------------


class PrefillWrapper:
    """FlashInfer's wrapper for several queries a request over paged KV, pages of one slot."""

    is_cuda_graph_enabled = False

    def __init__(self, *_: Any, **__: Any) -> None:
        self._plan: tuple[list[int], list[int], torch.Tensor] | None = None

    def begin_forward(
        self, queries: torch.Tensor, begins: torch.Tensor, slots: torch.Tensor, *_: Any, **options: Any
    ) -> None:
        """Where the queries of a request begin, where its slots do, all slots."""
        assert options.get("custom_mask") is None
        self._plan = queries.tolist(), begins.tolist(), slots.long().clone()

    def forward(
        self,
        q: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        *,
        sm_scale: float,
        causal: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        assert causal and self._plan is not None
        queries, begins, slots = self._plan
        assert queries[-1] == len(q) and begins[-1] <= len(slots)
        out = torch.full_like(q, float("nan"))
        for request in range(len(begins) - 1):
            rows = slice(queries[request], queries[request + 1])
            read = slots[begins[request] : begins[request + 1]]
            out[rows] = attend(q[rows], cache[0][read], cache[1][read], sm_scale)
        return out


class DecodeWrapper(PrefillWrapper):
    """The same for one query a request."""

    def begin_forward(self, begins: torch.Tensor, slots: torch.Tensor, *_: Any, **options: Any) -> None:  # type: ignore[override]
        super().begin_forward(torch.arange(len(begins)), begins, slots, **options)


class _OnCpu:
    """torch, for code that names the device `cuda` itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        del device
        return torch.empty(*size, **options)


def flashinfer_backend() -> type:
    """SGLang's FlashInferAttnBackend."""
    import sglang.srt.utils as utils

    package, cascade = ModuleType("flashinfer"), ModuleType("flashinfer.cascade")
    package.BatchDecodeWithPagedKVCacheWrapper = DecodeWrapper  # type: ignore[attr-defined]
    package.BatchPrefillWithPagedKVCacheWrapper = PrefillWrapper  # type: ignore[attr-defined]
    package.BatchPrefillWithRaggedKVCacheWrapper = PrefillWrapper  # type: ignore[attr-defined]
    package.fast_decode_plan = cascade.merge_state = None  # type: ignore[attr-defined]
    available, utils.is_flashinfer_available = utils.is_flashinfer_available, lambda: True
    try:
        with pretended(package, cascade):
            from sglang.srt.layers.attention import flashinfer_backend as module
    finally:
        utils.is_flashinfer_available = available
    module.torch = _OnCpu()
    backend: type = module.FlashInferAttnBackend
    return backend


def fill_packed_read_stream(
    self: Any,
    *,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    indptr: torch.Tensor,
    out: torch.Tensor,
    **_: Any,
) -> bool:
    """KVIndexTranslator's, whose kernel is Triton's: slots of the requests, one behind the other."""
    for request, length in enumerate(seq_lens.tolist()):
        begin = int(indptr[request])
        out[begin : begin + length] = self.req_to_token[req_pool_indices[request], :length]
    return False


# -- hooks -----------------------------------------------------------------------------------------------------------


def install_fa3(worker: Any) -> None:
    """The server's target attends through FlashAttention 3, as on a GPU; before its backends are made."""
    from sglang_er.engine.target_attention import make
    from sglang_er.engine.target_graphs import TargetGraphs

    _attend_through(fa3_backend())
    worker.target_graphs = TargetGraphs(worker.model_runner, attention=partial(make, worker.model_runner))


def install_flashinfer(worker: Any) -> None:
    """The same through FlashInfer, which needs no backend of its own for a width."""
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator

    del worker
    KVIndexTranslator.fill_packed_read_stream = fill_packed_read_stream
    _attend_through(flashinfer_backend())


def install_triton(worker: Any) -> None:
    """The same through SGLang's own attention, in Triton's interpreter."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    del worker
    _attend_through(TritonAttnBackend)


def _attend_through(backend: type) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from sglang_er.engine.cpu.platform import ATTENTION_BACKEND

    ATTENTION_BACKENDS[ATTENTION_BACKEND] = backend
