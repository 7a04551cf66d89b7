"""Exact verification of a drafted chain by rejection sampling (Leviathan et al. 2023, algorithm 1; Chen et al.
2023, theorem 1): draft d_i ~ q_i is kept with probability min(1, p_i(d_i) / q_i(d_i)); the first one rejected is
replaced by a draw from the positive part of p_i - q_i; if all are kept, one more token is drawn from p_{gamma+1}.

The committed tokens are distributed as the target's whatever q is, as long as the q passed here is the one the
drafts were drawn from. Sums and comparisons are made in float64: with a vocabulary of 150k tokens, float32
noise of 2**-24 a token would otherwise hand about one percent of the mass to tokens that have none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_er import kernels


class ChainResult(NamedTuple):
    """tokens int64 [B, gamma + 1] (valid up to accept_lens, then padding), accept_lens int32 [B] in 1..gamma+1."""

    tokens: torch.Tensor
    accept_lens: torch.Tensor


def sample_rows(weights: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One index per row of non-negative weights [R, V] (not normalized, sum > 0) -> int64 [R].

    Inverse transform in float64; a zero weight is never drawn, whatever the rounding.
    """
    return kernels.sample_rows(weights, _coins(weights, generator), implementation=_implementation(weights))


def verify_chain(
    p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, generator: torch.Generator | None = None
) -> ChainResult:
    """Accept or resample.

    Args:
        p: target probabilities [B, gamma + 1, V]; row i conditions on drafts[:, :i].
        q: draft probabilities [B, gamma, V], exactly those that `drafts` were drawn from.
        drafts: int64 [B, gamma].
    """
    coins = torch.rand(drafts.shape, dtype=torch.float64, device=drafts.device, generator=generator)
    # (p - q)+ after a rejection, p after a full acceptance. p == q up to rounding can reject with probability ~0 and
    # leave nothing: p itself is the limit.
    verified = kernels.verify_chain(p, q, drafts, coins, _coins(p, generator), implementation=_implementation(p))
    return ChainResult(*verified)


def verify_choices(choices: torch.Tensor, drafts: torch.Tensor) -> ChainResult:
    """Keep drafts while they are the target's own choice (greedy, or seeded sampling with shared noise).

    choices int64 [B, gamma + 1] = the target's token at every position; drafts int64 [B, gamma].
    """
    accepted = (choices[:, :-1] == drafts).to(torch.int64).cumprod(dim=1).sum(dim=1)
    return ChainResult(choices, (accepted + 1).to(torch.int32))


def _coins(weights: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(weights.shape[:1], dtype=torch.float64, device=weights.device, generator=generator)


def _implementation(weights: torch.Tensor) -> str | None:
    """Compiled kernels draw from float32, which is what the filters give; the formula in torch from anything."""
    return None if weights.dtype == torch.float32 else "reference"
