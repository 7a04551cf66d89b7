"""As `kernel_makers.py`, for the ops that turn logits and weights into tokens."""

from __future__ import annotations

import math

import torch

from sglang_er import kernels
from sglang_er.kernels.chain_ops import verify_chain as chain_op
from sglang_er.kernels.sampling_ops import choose_seeded as seeded_op
from sglang_er.kernels.sampling_ops import draft_sample as sample_op

from .kernel_makers import FP32, REFERENCE, Draw, Guarded, Prepared

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


def draft_sample(rows: int, cols: int, filters: str, dtype: torch.dtype, draw: Draw) -> Prepared:
    """`filters`: which the batch has, of "k", "p" and "m"; row 0 has none. The error is q's, infinite if another set is
    kept (see `_beyond_the_boundary`) or the token is not the coin's."""
    logits = (draw.normal(rows, cols + 8) * 4).to(dtype)[:, :cols]
    logits[:, :: max(2, cols // 9)] = -math.inf
    temperatures = torch.linspace(0.3, 1.7, rows, device=draw.device)
    spread = torch.rand(rows, generator=draw.generator).to(draw.device)
    given = {
        "top_ks": (cols**spread).to(torch.int32) if "k" in filters else None,
        "top_ps": spread.flip(0).sqrt() if "p" in filters else None,
        "min_ps": spread**8 if "m" in filters else None,
    }
    for column, none in zip(given.values(), (0, 1.0, 0.0)):
        if column is not None:
            column[0] = none
    coins = draw.coins(rows)
    coins[0], coins[-1] = 0.0, 1.0 - 2.0**-53
    _, truth = sample_op(logits.double(), temperatures, coins, **given, implementation=REFERENCE)
    guarded, drawn = Guarded(rows, cols, FP32, draw.device), torch.empty(0)

    def call(implementation: str) -> None:
        nonlocal drawn
        drawn, _ = sample_op(logits, temperatures, coins, **given, out=guarded.poison(), implementation=implementation)

    def error() -> float:
        q = guarded.out
        if _beyond_the_boundary(q, truth, logits) or off_the_coin(q.double(), coins, drawn) > DRAW_TOLERANCE:
            return math.inf
        same = ((q > 0) == (truth > 0)).all(-1, keepdim=True)
        return guarded.error(torch.where(same, truth, q))

    return Prepared(call, error, 1e-5)


def _beyond_the_boundary(q: torch.Tensor, truth: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether q keeps or leaves tokens that are further than rounding from the last one that `truth` keeps. Not counted
    is less than 1e-5 of the mass: where SGLang's fp32 sums, which CPUs have, come above a top_p of 1."""
    last = torch.where(truth > 0, logits.double(), math.inf).amin(-1, keepdim=True)
    wrong = ((q > 0) != (truth > 0)) & ((logits.double() - last).abs() > 1e-5 * last.abs() + 1e-5)
    return not bool(((torch.maximum(q, truth) * wrong).sum(-1) < 1e-5).all())


def choose_seeded(rows: int, cols: int, dtype: torch.dtype, draw: Draw) -> Prepared:
    logits = (draw.normal(rows, cols + 8) * 2).to(dtype)[:, :cols]
    logits[:, 1 :: max(2, cols // 9)] = -math.inf
    temperatures = torch.linspace(0.3, 1.7, rows, device=draw.device)
    seeds, positions = (draw.coins(rows) * 2**62).to(torch.int64), torch.arange(rows, device=draw.device) * 977
    truth = seeded_op(logits.double(), temperatures, seeds, positions, implementation=REFERENCE)
    found = torch.empty(0)

    def call(implementation: str) -> None:
        nonlocal found
        found = seeded_op(logits, temperatures, seeds, positions, implementation=implementation)

    return Prepared(call, lambda: float((found != truth).double().mean()), 0.0)


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
