"""Attention over the paged KV pool, as the rest of the house calls it (see ``ops.py``)."""

from __future__ import annotations

import torch

from sglang_er.kernels.base import HALF_DTYPES, WEIGHT_DTYPES, check_device, check_dtype
from sglang_er.kernels.cpu import kv_shadow_store as cpu_kv_shadow_store
from sglang_er.kernels.cpu import paged_attention as cpu_paged_attention
from sglang_er.kernels.cuda import dequant_attention
from sglang_er.kernels.cuda import kv_shadow_store as cuda_store
from sglang_er.kernels.kv_shadow import KvShadow
from sglang_er.kernels.reference import kv_shadow_store as reference_kv_shadow_store
from sglang_er.kernels.reference import paged_attention as reference_paged_attention
from sglang_er.kernels.registry import REFERENCE, Implementation, register, register_cuda, register_triton, run

_KV_DTYPES = WEIGHT_DTYPES
_REFERENCE_DTYPES = WEIGHT_DTYPES | {torch.float64}
_MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8

register(
    "paged_attention",
    Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_paged_attention.paged_attention),
)
register(
    "paged_attention",
    Implementation("cpu", "cpu", WEIGHT_DTYPES, cpu_paged_attention.paged_attention, cpu_paged_attention.serves),
)
register("kv_shadow_store", Implementation(REFERENCE, None, WEIGHT_DTYPES, reference_kv_shadow_store.kv_shadow_store))
register(
    "kv_shadow_store",
    Implementation("cpu", "cpu", WEIGHT_DTYPES, cpu_kv_shadow_store.kv_shadow_store, cpu_kv_shadow_store.serves),
)
register_cuda(
    "paged_attention", frozenset({torch.bfloat16}), dequant_attention.paged_attention, dequant_attention.serves
)
register_cuda("kv_shadow_store", HALF_DTYPES, cuda_store.kv_shadow_store, cuda_store.serves)
register_triton("paged_attention", WEIGHT_DTYPES)
register_triton("kv_shadow_store", WEIGHT_DTYPES)


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    query_begin: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    shadow: KvShadow | None = None,
    valid: torch.Tensor | None = None,
    exact_newest: int = 0,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """``out[t, h] = softmax(scale * q[t, h] @ K.T) @ V`` over the keys that token t sees; decode, verify, prefill.

    ``q[tokens, heads, head_dim]`` holds the last tokens of every request: those of request b are rows
    ``query_begin[b]`` to ``query_begin[b + 1]`` (int64 ``[B + 1]``, rising from 0 to ``tokens``; a request may have
    none). Its context has ``context_lens[b]`` tokens (int64), whose KV is in the pool already; position p lies in
    slot ``req_to_token[rows[b], p]`` (int32; ``rows`` int64) of ``keys[slots, kv_heads, head_dim]`` and
    ``values[slots, kv_heads, value_dim]``. A token sees positions up to its own and, if ``window >= 0``, at most
    ``window`` before it. ``heads`` is a multiple of ``kv_heads``; query head h reads KV head ``h * kv_heads // heads``.

    ``q`` and the pool are bf16, fp16 or fp32 (the reference takes an fp64 ``q``), ``out`` has the dtype of ``q`` or is
    fp32; sums are fp32. Tokens of ``q`` and ``out`` and slots of the pool may lie any distance apart. The result
    of a token has the same bits in any batch, at any number of query tokens and of threads.

    With a ``shadow``, slots with ``valid`` (uint8 ``[slots]``) at positions before the newest ``exact_newest`` of the
    context are read from it, the others from the pool, exactly as without a shadow.
    """
    _check_heads("q", q)
    _check_pool(keys, values)
    slots, kv_heads, head_dim = keys.shape
    value_dim = values.shape[2]
    if q.shape[2] != head_dim or kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q has shape {list(q.shape)}, expected [any, multiple of {kv_heads}, {head_dim}]")
    if req_to_token.ndim != 2 or req_to_token.dtype != torch.int32 or req_to_token.stride(1) != 1:
        raise ValueError(
            f"req_to_token is {req_to_token.dtype} {list(req_to_token.shape)}, expected int32 with contiguous rows"
        )
    if shadow is not None:
        shadow.check_fits(keys, values)
        check_device("shadow", shadow.keys, q.device)
        if valid is None or valid.shape != (slots,) or valid.dtype != torch.uint8 or not valid.is_contiguous():
            raise ValueError(f"valid is {_describe(valid)}, expected a contiguous torch.uint8 [{slots}]")
        if exact_newest < 0:
            raise ValueError(f"exact_newest {exact_newest} is negative")
    requests = rows.shape[0] if rows.ndim == 1 else 0
    _check_int64("rows", rows, requests)
    _check_int64("query_begin", query_begin, requests + 1)
    _check_int64("context_lens", context_lens, requests)
    if out is None:
        out = q.new_empty((q.shape[0], q.shape[1], value_dim))
    else:
        _check_heads("out", out)
        check_dtype("out", out, frozenset({q.dtype, torch.float32}))
        if out.shape != (q.shape[0], q.shape[1], value_dim):
            raise ValueError(f"out has shape {list(out.shape)}, expected {[*q.shape[:2], value_dim]}")
    for name, tensor in (("keys", keys), ("values", values), ("req_to_token", req_to_token), ("out", out)):
        check_device(name, tensor, q.device)
    run(
        "paged_attention",
        q.device.type,
        q.dtype,
        implementation,
        q,
        keys,
        values,
        req_to_token,
        rows,
        query_begin,
        context_lens,
        scale,
        window,
        shadow,
        valid,
        exact_newest,
        out,
    )
    return out


def kv_shadow_store(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    shadow: KvShadow,
    *,
    implementation: str | None = None,
) -> None:
    """Quantizes ``slots`` (int64) of one layer's pool into its shadow; ``kv_shadow.h`` has the formulas.

    Pool values must be finite: of a key or value that is not, scale and levels may be anything, but no fp8 code is
    NaN. Kernels of a GPU leave out slots that the pool does not have. The flags that say which slots may be read are
    the caller's. A CPU's compiled kernels know no fp8.
    """
    _check_pool(keys, values)
    _check_int64("slots", slots, slots.shape[0] if slots.ndim == 1 else 0)
    shadow.check_fits(keys, values)
    for name, tensor in (("values", values), ("slots", slots), ("shadow", shadow.keys)):
        check_device(name, tensor, keys.device)
    run("kv_shadow_store", keys.device.type, keys.dtype, implementation, keys, values, slots, shadow)


def _check_pool(keys: torch.Tensor, values: torch.Tensor) -> None:
    _check_heads("keys", keys)
    _check_heads("values", values)
    check_dtype("keys", keys, _KV_DTYPES)
    check_dtype("values", values, frozenset({keys.dtype}))
    slots, kv_heads, head_dim = keys.shape
    if values.shape[:2] != keys.shape[:2]:
        raise ValueError(f"values has shape {list(values.shape)}, expected [{slots}, {kv_heads}, any]")
    for name, size in (("head_dim", head_dim), ("value_dim", values.shape[2])):
        if size % _HEAD_DIM_MULTIPLE or not 0 < size <= _MAX_HEAD_DIM:
            raise ValueError(f"{name} {size} is not a multiple of {_HEAD_DIM_MULTIPLE} up to {_MAX_HEAD_DIM}")


def _check_heads(name: str, tensor: torch.Tensor) -> None:
    """``[any, heads, dim]`` with each ``[heads, dim]`` contiguous."""
    if tensor.ndim != 3:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected three dimensions")
    _, heads, dim = tensor.shape
    stride = tensor.stride()
    if (stride[2] != 1 and dim > 1) or (stride[1] != dim and heads > 1):
        raise ValueError(f"{name} has strides {stride}, the {heads} x {dim} values of a row must be contiguous")


def _describe(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _check_int64(name: str, tensor: torch.Tensor, size: int) -> None:
    if tensor.shape != (size,) or tensor.dtype != torch.int64 or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected a contiguous int64 [{size}]")
