"""Acceptance of a W4 draft, measured without a server, and the search for the `kappa` that gives a wanted acceptance.

alpha = mean over positions of 1 - TV(p, q) = sum of min(p, q) at temperature 1: p is the target's distribution of the
next token, q the draft's. The draft has every matrix, the output matrix too, rounded to int4
(`reference.fake_quantize`) and reads the target's keys and values before the current token, as the engine's draft pass
does. Activations are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang_er.models import reference, tiny
from sglang_er.models.expand import Expansion
from sglang_er.models.make import MAX_KAPPA
from sglang_er.models.streams import SmallStreams, layer_of
from sglang_er.models.tiny import TINY

if TYPE_CHECKING:
    import torch

TOLERANCE = 0.004
FIRST_KAPPA = 3.0
MIN_KAPPA = 0.02
MAX_TRIES = 20


def overlap(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """sum of min(p, q) over the last dimension; q may have more entries than p, which then count for nothing."""
    import torch

    return torch.minimum(logp.exp(), logq[..., : logp.shape[-1]].exp()).sum(-1)


def measure_tiny(arch: str, ids: torch.Tensor, kept: torch.Tensor, shared_kv: bool = True) -> float:
    """alpha of the trained model itself. `shared_kv` False: the draft reads its own keys and values."""
    weights = {name: value.float() for name, value in tiny.load_weights(arch).items()}
    small = SmallStreams(weights, ids)
    x = small.streams[0]
    for index in range(TINY.layers):
        layer = layer_of(weights, index)
        context = reference.keys_values(layer, small.streams[index], TINY) if shared_kv else None
        x = reference.layer_forward(reference.quantize_layer(layer), x, TINY, context)
    final = reference.rms_norm(x, weights["model.norm.weight"], TINY.eps)
    logq = (final @ reference.fake_quantize(weights["lm_head.weight"]).T).log_softmax(-1)
    return float(overlap(small.logp, logq)[kept].mean())


def measure(model: Expansion, ids: torch.Tensor, kept: torch.Tensor, shared_kv: bool = True) -> float:
    """alpha of an expansion. Every layer is made, used and dropped; p is the small model's, whose function it is."""
    import torch

    shape = model.shape
    small = SmallStreams(model.small, ids)
    x = model.embedding(0, TINY.vocab)[ids]
    for index in range(shape.layers):
        made = {name: value.bfloat16().float() for name, value in model.layer(index).items()}
        context = None
        if shared_kv:
            stream = small.streams[sum(big < index for big in model.real)] @ model.rotation.T
            context = reference.keys_values(made, stream, shape)
        x = reference.layer_forward(reference.quantize_layer(made), x, shape, context)
    final = reference.rms_norm(x[kept], torch.ones(shape.hidden), shape.eps)
    rows = model.head(0, TINY.vocab + 1)  # every row beyond the small vocabulary is the same: one stands for all
    logits = final @ reference.fake_quantize(rows.bfloat16().float()).T
    rest = torch.tensor(float(max(shape.vocab - TINY.vocab, 0))).log()
    logits[:, -1] += rest
    return float(overlap(small.logp[kept], logits.log_softmax(-1)).mean())


def find_kappa(
    alpha_of: Callable[[float], float], target: float, progress: Callable[[str], None] = lambda line: None
) -> tuple[float, float]:
    """The kappa in 0..16 whose alpha is within 0.004 of `target`, and that alpha.

    Bisection, sped up by interpolating log(1 - alpha), which is smoother than alpha. alpha falls as kappa grows.
    Raises ValueError for a `target` above what kappa near 0 gives or that no kappa meets.
    """

    def attempt(kappa: float) -> float:
        alpha = alpha_of(kappa)
        progress(f"kappa {kappa:.4f}: alpha {alpha:.4f}")
        return alpha

    def loss(alpha: float) -> float:
        return math.log(max(1.0 - alpha, 1e-6))

    # What no noise gives is not measured: a try is dear, and the interpolation needs no more than an idea of it.
    low, high = (0.0, loss(0.995)), (MAX_KAPPA, loss(0.0))
    kappa = FIRST_KAPPA
    for _ in range(MAX_TRIES):
        alpha = attempt(kappa)
        if abs(alpha - target) <= TOLERANCE:
            return kappa, alpha
        if kappa < MIN_KAPPA and alpha < target:
            raise ValueError(f"target alpha {target} cannot be reached: with next to no noise it is {alpha:.4f}")
        # A draft that diverges gives no number: that is too much noise.
        low, high = (
            ((kappa, loss(alpha)), high)
            if alpha > target
            else (low, (kappa, loss(0.0 if math.isnan(alpha) else alpha)))
        )
        share = (loss(target) - low[1]) / max(high[1] - low[1], 1e-9)
        kappa = low[0] + (high[0] - low[0]) * min(max(share, 0.15), 0.85)
    raise ValueError(f"target alpha {target} cannot be met: kappa {kappa:.4f} gives {alpha:.4f}")
