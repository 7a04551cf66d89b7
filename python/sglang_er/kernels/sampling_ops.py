"""Drawing tokens from logits and weights, as the rest of the house calls it (see ``ops.py``)."""

from __future__ import annotations

import torch

from sglang_er.kernels.base import (
    WEIGHT_DTYPES,
    check_device,
    check_dtype,
    check_matrix,
    check_vector,
    check_weights,
)
from sglang_er.kernels.cpu import sample_rows as cpu_sample_rows
from sglang_er.kernels.cpu import softmax_rows as cpu_softmax_rows
from sglang_er.kernels.reference import sample_rows as reference_sample_rows
from sglang_er.kernels.reference import softmax_rows as reference_softmax_rows
from sglang_er.kernels.registry import REFERENCE, Implementation, register, register_triton, run

_REFERENCE_DTYPES = WEIGHT_DTYPES | {torch.float64}

register("sample_rows", Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_sample_rows.sample_rows))
register("sample_rows", Implementation("cpu", "cpu", frozenset({torch.float32}), cpu_sample_rows.sample_rows))
register("softmax_rows", Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_softmax_rows.softmax_rows))
register("softmax_rows", Implementation("cpu", "cpu", WEIGHT_DTYPES, cpu_softmax_rows.softmax_rows))
register_triton("sample_rows", frozenset({torch.float32}))
register_triton("softmax_rows", WEIGHT_DTYPES)


def sample_rows(
    weights: torch.Tensor,
    coins: torch.Tensor,
    subtract: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """One index a row, int64 ``[R]``: the first ``i`` with ``w[0] + ... + w[i] > coin * sum(w)``, sums in fp64.

    Either ``weights[R, V]``, and ``w`` is a row of it; or ``weights[R, W, V]`` with ``subtract[R, S, V]``, and for
    ``o = offsets[r]`` (int64 ``[R]``, below ``W``)::

        w = max(weights[r, o] - subtract[r, o], 0)  where o < S and that has a sum > 0, else weights[r, o]

    ``coins`` are fp64 ``[R]`` in [0, 1). Weights are not negative and have a sum > 0; they need not be normalized. An
    index without weight is never drawn. Only the last dimension must be contiguous; nothing of that size is allocated.
    """
    rows = weights.shape[0]
    dims = 2 if subtract is None else 3
    if (offsets is None) != (subtract is None):
        raise ValueError("subtract and offsets are given together or not at all")
    check_weights("weights", weights, dims, rows, weights.shape[-1])
    check_vector("coins", coins, rows)
    check_dtype("coins", coins, frozenset({torch.float64}))
    check_device("coins", coins, weights.device)
    if subtract is not None and offsets is not None:
        check_weights("subtract", subtract, dims, rows, weights.shape[-1])
        check_dtype("subtract", subtract, frozenset({weights.dtype}))
        check_device("subtract", subtract, weights.device)
        check_vector("offsets", offsets, rows)
        check_dtype("offsets", offsets, frozenset({torch.int64}))
        check_device("offsets", offsets, weights.device)
    out = torch.empty(rows, dtype=torch.int64, device=weights.device)
    if rows > 0:
        device, dtype = weights.device.type, weights.dtype
        run("sample_rows", device, dtype, implementation, weights, subtract, offsets, coins, out)
    return out


def softmax_rows(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """``out[R, V] = softmax(logits[R, V] / temperatures[R, None])`` in fp32; ``logits`` bf16, fp16 or fp32.

    ``-inf`` gives 0; a row with a NaN, an infinity above, or nothing but ``-inf`` becomes NaN, as in torch.
    """
    check_matrix("logits", logits, None, None)
    check_vector("temperatures", temperatures, logits.shape[0])
    check_dtype("temperatures", temperatures, frozenset({torch.float32}))
    check_device("temperatures", temperatures, logits.device)
    if out is None:
        out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    else:
        check_matrix("out", out, *logits.shape)
        check_dtype("out", out, frozenset({torch.float32}))
        check_device("out", out, logits.device)
    if out.numel() > 0:
        run("softmax_rows", logits.device.type, logits.dtype, implementation, logits, temperatures, out)
    return out
