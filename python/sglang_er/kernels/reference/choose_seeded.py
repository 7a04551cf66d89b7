from __future__ import annotations

import torch

from sglang_er.kernels.reference.murmur_hash import murmur_hash32


def choose_seeded(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
) -> None:
    columns = torch.arange(logits.shape[1], device=logits.device)
    uniform = murmur_hash32(seeds, positions, columns).to(torch.float64) / 0xFFFFFFFF
    # At both ends of the hash's range as SGLang has it: no infinity.
    exponential = -uniform.log().clamp(min=torch.finfo(torch.float64).min, max=-(2.0**-32))
    scores = logits.to(torch.float64) / temperatures.to(torch.float64)[:, None] - exponential.log()
    tokens.copy_(scores.argmax(dim=-1))
