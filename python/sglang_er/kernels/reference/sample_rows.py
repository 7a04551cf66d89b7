from __future__ import annotations

import torch


def sample_rows(
    weights: torch.Tensor,
    subtract: torch.Tensor | None,
    offsets: torch.Tensor | None,
    coins: torch.Tensor,
    out: torch.Tensor,
) -> None:
    if subtract is not None and offsets is not None:
        weights = _residual(weights, subtract, offsets)
    cdf = weights.to(torch.float64).cumsum(dim=-1)
    total = cdf[:, -1:]
    # The coin is below 1, its product with the total may still round up to the total.
    threshold = torch.minimum(coins[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    out.copy_(torch.searchsorted(cdf, threshold, right=True).squeeze(-1))


def _residual(weights: torch.Tensor, subtract: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(weights.shape[0], device=weights.device)
    width = subtract.shape[1]
    p = weights[rows, offsets].to(torch.float64)
    if width == 0:
        return p
    q = subtract[rows, offsets.clamp(max=width - 1)].to(torch.float64)
    residual = torch.where((offsets < width)[:, None], (p - q).clamp_(min=0.0), p)
    return torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p)
