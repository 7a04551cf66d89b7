"""As `kernel_makers.py`, for the ops that turn logits and weights into tokens."""

from __future__ import annotations

import math

import torch

from sglang_er import kernels
from sglang_er.kernels.chain_ops import verify_chain as chain_op

from .kernel_makers import FP32, Draw, Guarded, Prepared

# Sums in fp64 that differ in their order only; in fp32 they would be off by a thousand times as much.
DRAW_TOLERANCE = 1e-10


def softmax_rows(rows: int, cols: int, dtype: torch.dtype, draw: Draw) -> Prepared:
    logits = (draw.normal(rows, cols + 8) * 4).to(dtype)[:, :cols]
    logits[:, :: max(2, cols // 9)] = -math.inf
    temperatures = torch.linspace(0.3, 1.7, rows, device=draw.device)
    truth = torch.softmax(logits.double() / temperatures.double()[:, None], dim=-1)
    guarded = Guarded(rows, cols, FP32, draw.device)

    def call(implementation: str) -> None:
        kernels.softmax_rows(logits, temperatures, guarded.poison(), implementation=implementation)

    return Prepared(call, lambda: guarded.error(truth), 1e-5)


def sample_rows(rows: int, chain: int, cols: int, draw: Draw) -> Prepared:
    """`chain`: drafts of a chain, 0 for plain drawing."""
    shape = (rows, chain + 1, cols) if chain else (rows, cols)
    weights = (draw.normal(*shape) * 3).softmax(-1)
    weights[..., ::5] = 0
    w, subtract, offsets = weights.double(), None, None
    if chain:
        subtract = (draw.normal(rows, chain, cols) * 3).softmax(-1)
        subtract[0] = weights[0, :chain]  # nothing is left: the weights themselves are drawn from
        offsets = torch.arange(rows, device=draw.device) % (chain + 1)
        w = residuals(weights, subtract, offsets)
    coins = draw.coins(rows)
    coins[0], coins[-1] = 0.0, 1.0 - 2.0**-53
    drawn: list[torch.Tensor] = []

    def call(implementation: str) -> None:
        drawn[:] = [kernels.sample_rows(weights, coins, subtract, offsets, implementation=implementation)]

    return Prepared(call, lambda: off_the_coin(w, coins, drawn[0]), DRAW_TOLERANCE)


def verify_chain(rows: int, gamma: int, cols: int, draw: Draw) -> Prepared:
    """Drafts drawn from q; row 0 has q = p, where all are kept. How many are kept is the same to the last bit."""
    p = (draw.normal(rows, gamma + 1, cols) * 3).softmax(-1)
    q = (p[:, :gamma].log() + draw.normal(rows, gamma, cols) * 0.5).softmax(-1)
    q[0] = p[0, :gamma]
    coins = draw.coins(rows * gamma)
    drafts = kernels.sample_rows(q.flatten(0, 1), coins, implementation="reference").view(rows, gamma)
    accept, resample = draw.coins(rows * gamma).view(rows, gamma), draw.coins(rows)
    tokens, lens = chain_op(p, q, drafts, accept, resample, implementation="reference")
    kept = lens.long() - 1
    w = residuals(p, q, kept)
    found: list[torch.Tensor] = []

    def call(implementation: str) -> None:
        found[:] = chain_op(p, q, drafts, accept, resample, implementation=implementation)

    def error() -> float:
        got, got_lens = found
        last = torch.arange(gamma + 1, device=draw.device) == kept[:, None]
        if not torch.equal(got_lens, lens) or not torch.equal(got[~last], tokens[~last]):
            return math.inf
        return off_the_coin(w, resample, got[last])

    return Prepared(call, error, DRAW_TOLERANCE)


def off_the_coin(w: torch.Tensor, coins: torch.Tensor, drawn: torch.Tensor) -> float:
    """How far outside of the drawn index's weight a coin lies, as a share of all weight: the largest of the rows."""
    index = drawn[:, None]
    if not bool(((index >= 0) & (index < w.shape[1])).all()):
        return math.inf
    cdf = w.cumsum(-1)
    mass, high, total = w.gather(1, index), cdf.gather(1, index), cdf[:, -1:]
    target = coins[:, None] * total
    off = torch.maximum(high - mass - target, target - high).clamp_min(0) / total
    return float(torch.where(mass > 0, off, math.inf).max())


def residuals(weights: torch.Tensor, subtract: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """What each row is drawn from, in fp64 (see `kernels.sample_rows`)."""
    return torch.stack([_residual(*row) for row in zip(weights, subtract, offsets.tolist())])


def _residual(weights: torch.Tensor, subtract: torch.Tensor, offset: int) -> torch.Tensor:
    p = weights[offset].double()
    rest = (p - subtract[offset].double()).clamp_min(0) if offset < subtract.shape[0] else p
    return rest if rest.sum() > 0 else p
