"""Verifying a drafted chain in one op, as the rest of the house calls it (see ``ops.py``)."""

from __future__ import annotations

import torch

from sglang_er.kernels.base import WEIGHT_DTYPES, check_device, check_dtype, check_matrix, check_vector, check_weights
from sglang_er.kernels.cpu import verify_chain as cpu_verify_chain
from sglang_er.kernels.reference import verify_chain as reference_verify_chain
from sglang_er.kernels.registry import REFERENCE, Implementation, register, register_triton, run

_REFERENCE_DTYPES = WEIGHT_DTYPES | {torch.float64}

register("verify_chain", Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_verify_chain.verify_chain))
register("verify_chain", Implementation("cpu", "cpu", frozenset({torch.float32}), cpu_verify_chain.verify_chain))
register_triton("verify_chain", frozenset({torch.float32}))


def verify_chain(
    p: torch.Tensor,
    q: torch.Tensor,
    drafts: torch.Tensor,
    accept_coins: torch.Tensor,
    resample_coins: torch.Tensor,
    *,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling of a chain -> ``tokens`` int64 ``[B, gamma + 1]``, ``accept_lens`` int32 ``[B]``.

    ``p[B, gamma + 1, V]`` and ``q[B, gamma, V]`` are the probabilities of target and draft, of one dtype; ``drafts``
    int64 ``[B, gamma]`` are token ids, gamma > 0. Draft i is kept while ``accept_coins[b, i] * q[b, i, draft] <
    p[b, i, draft]``, in fp64. At ``a``, the number of drafts kept::

        tokens[b, a] = the index of resample_coins[b] in max(p[b, a] - q[b, a], 0)
                       or in p[b, a], where a = gamma or that has no sum          (see sample_rows)

    ``accept_lens = a + 1``. Before ``a`` ``tokens`` holds the drafts, after it the other drafts and then the first one,
    which is padding. Coins are fp64 ``[B, gamma]`` and ``[B]`` in [0, 1). Only the last dimension of ``p``, ``q``,
    ``drafts`` and ``accept_coins`` must be contiguous. Token ids are not checked: that would wait for the device.
    """
    check_matrix("drafts", drafts, None, None)
    check_dtype("drafts", drafts, frozenset({torch.int64}))
    rows, gamma = drafts.shape
    if gamma == 0:
        raise ValueError(f"drafts has shape {list(drafts.shape)}, no draft to verify")
    for name, weights, width in (("p", p, gamma + 1), ("q", q, gamma)):
        check_weights(name, weights, 3, rows, p.shape[-1])
        if weights.shape[1] != width:
            raise ValueError(f"{name} has shape {list(weights.shape)}, expected [{rows}, {width}, {p.shape[-1]}]")
    check_dtype("q", q, frozenset({p.dtype}))
    check_matrix("accept_coins", accept_coins, rows, gamma)
    check_vector("resample_coins", resample_coins, rows)
    for name, coins in (("accept_coins", accept_coins), ("resample_coins", resample_coins)):
        check_dtype(name, coins, frozenset({torch.float64}))
    for name, tensor in (("q", q), ("drafts", drafts), ("accept_coins", accept_coins)):
        check_device(name, tensor, p.device)
    check_device("resample_coins", resample_coins, p.device)
    tokens = torch.empty((rows, gamma + 1), dtype=torch.int64, device=p.device)
    accept_lens = torch.empty(rows, dtype=torch.int32, device=p.device)
    if rows > 0:
        arguments = (p, q, drafts, accept_coins, resample_coins, tokens, accept_lens)
        run("verify_chain", p.device.type, p.dtype, implementation, *arguments)
    return tokens, accept_lens
