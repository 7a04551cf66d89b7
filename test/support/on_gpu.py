"""Where there is no GPU: a tensor that says it is on one."""

from __future__ import annotations

import torch


class OnGpu(torch.Tensor):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnGpu)
