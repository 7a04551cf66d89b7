from __future__ import annotations

import torch

from sglang_er.kernels.cpu.loader import library


def softmax_rows(logits: torch.Tensor, temperatures: torch.Tensor, out: torch.Tensor) -> None:
    library().softmax_rows(logits, temperatures, out, torch.get_num_threads())
