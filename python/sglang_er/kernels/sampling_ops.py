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
from sglang_er.kernels.cpu import draft_sample as cpu_draft_sample
from sglang_er.kernels.cpu import sample_rows as cpu_sample_rows
from sglang_er.kernels.cpu import softmax_rows as cpu_softmax_rows
from sglang_er.kernels.reference import choose_seeded as reference_choose_seeded
from sglang_er.kernels.reference import draft_sample as reference_draft_sample
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
register("draft_sample", Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_draft_sample.draft_sample))
register("draft_sample", Implementation("cpu", "cpu", WEIGHT_DTYPES, cpu_draft_sample.draft_sample))
register("choose_seeded", Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_choose_seeded.choose_seeded))
register_triton("draft_sample", WEIGHT_DTYPES)
register_triton("choose_seeded", WEIGHT_DTYPES)


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
    _check_column("temperatures", temperatures, torch.float32, logits)
    out = _probabilities(logits, out)
    if out.numel() > 0:
        run("softmax_rows", logits.device.type, logits.dtype, implementation, logits, temperatures, out)
    return out


def draft_sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    coins: torch.Tensor,
    *,
    top_ks: torch.Tensor | None = None,
    top_ps: torch.Tensor | None = None,
    min_ps: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token a row and what it was drawn from -> ``tokens`` int64 ``[R]``, ``q`` fp32 ``[R, V]``: ``out``, if given.

    With ``p = softmax(logits[R, V] / temperatures[R, None])``, ``logits`` bf16, fp16 or fp32, a token is kept if ::

        tokens likelier than it        < top_ks     int32 [R]; a row with 0 or less, or at least V, has no such filter
        mass of tokens likelier        <= top_ps    fp32 [R] in [0, 1]; 1: none
        p / (largest p of the row)     >= min_ps    fp32 [R] in [0, 1]; 0: none

    all three of ``p`` before any is applied; None: no row has that filter. ``q`` is ``p`` of the kept ones, normalized,
    and 0 elsewhere; ``tokens`` are ``sample_rows(q, coins)``, coins fp64 ``[R]``: a token of zero ``q`` is never drawn.

    Tokens as likely as the last one kept are kept too; the implementation ``cpu`` keeps of those the first ones in a
    sort, as many as SGLang would. Nothing waits for the device, and what is launched does not depend on values. A row
    that ``softmax_rows`` makes NaN becomes NaN, and its token is some index of the row.
    """
    check_matrix("logits", logits, None, None)
    rows, size = logits.shape
    if size == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}, nothing to draw")
    _check_column("temperatures", temperatures, torch.float32, logits)
    _check_column("coins", coins, torch.float64, logits)
    for name, column, dtype in (
        ("top_ks", top_ks, torch.int32),
        ("top_ps", top_ps, torch.float32),
        ("min_ps", min_ps, torch.float32),
    ):
        if column is not None:
            _check_column(name, column, dtype, logits)
    out = _probabilities(logits, out)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows > 0:
        arguments = (logits, temperatures, top_ks, top_ps, min_ps, coins, tokens, out)
        run("draft_sample", logits.device.type, logits.dtype, implementation, *arguments)
    return tokens, out


def choose_seeded(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """The token that SGLang's seeded sampler chooses without filters, int64 ``[R]``.

    ``argmax(logits[R, V] / temperatures[R, None] + noise)`` in fp64, the noise Gumbel's, from the hash of ``seeds`` and
    ``positions`` (int64 ``[R]``) and the column. SGLang adds the same noise to fp32 log-probabilities: where their
    rounding decides between two tokens (some 1e-6 apart), the choice may be the other one. The smallest index of equal
    scores. A row with a NaN chooses some index of the row.
    """
    check_matrix("logits", logits, None, None)
    rows, size = logits.shape
    if size == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}, nothing to choose")
    _check_column("temperatures", temperatures, torch.float32, logits)
    _check_column("seeds", seeds, torch.int64, logits)
    _check_column("positions", positions, torch.int64, logits)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows > 0:
        arguments = (logits, temperatures, seeds, positions, tokens)
        run("choose_seeded", logits.device.type, logits.dtype, implementation, *arguments)
    return tokens


def _check_column(name: str, column: torch.Tensor, dtype: torch.dtype, logits: torch.Tensor) -> None:
    """One value a row of the logits."""
    check_vector(name, column, logits.shape[0])
    check_dtype(name, column, frozenset({dtype}))
    check_device(name, column, logits.device)


def _probabilities(logits: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """``out``, checked, or a new one: fp32 of the shape of the logits."""
    if out is None:
        return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    check_matrix("out", out, *logits.shape)
    check_dtype("out", out, frozenset({torch.float32}))
    check_device("out", out, logits.device)
    return out
