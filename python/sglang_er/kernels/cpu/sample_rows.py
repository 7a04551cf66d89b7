from __future__ import annotations

import torch

from sglang_er.kernels.cpu.loader import library


def sample_rows(
    weights: torch.Tensor,
    subtract: torch.Tensor | None,
    offsets: torch.Tensor | None,
    coins: torch.Tensor,
    out: torch.Tensor,
) -> None:
    library().sample_rows(weights, subtract, offsets, coins, out, torch.get_num_threads())
