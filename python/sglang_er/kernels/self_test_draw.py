"""What the self-tests (`self_test.py`, `self_test_sampling.py`) share: random arguments, outputs that were not written
before, and how far a result may be from the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

Function = Callable[..., Any]

_POISON = 0xAA
# Of the largest value; sums differ in their order, results are rounded to the output's type.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


class Draw:
    def __init__(self, device: str, dtype: torch.dtype, serves: Callable[..., bool]) -> None:
        self.device, self.dtype, self.serves = device, dtype, serves
        self._generator = torch.Generator().manual_seed(7)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype or self.dtype)

    def coins(self, rows: int) -> torch.Tensor:
        return torch.rand(rows, generator=self._generator, dtype=torch.float64).to(self.device)

    def ints(self, values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def permutation(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randperm(size, generator=self._generator).to(self.device, dtype)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.uint8).fill_(_POISON)
    return tensor


def reference_of(reference: Function, *arguments: Any) -> None:
    """Into the last argument, a tensor, what the reference makes of the others, computed on the CPU: a server may have
    put less exact products in the place of torch's on its GPU (deterministic inference: tf32 for fp32)."""
    *inputs, out = arguments
    truth = torch.empty_like(out, device="cpu")
    reference(*map(_on_cpu, inputs), truth)
    out.copy_(truth)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if is_dataclass(value) and not isinstance(value, type):
        tensors = {field.name: _on_cpu(getattr(value, field.name)) for field in fields(value) if field.init}
        return replace(value, **tensors)
    return value


def near(result: torch.Tensor, truth: torch.Tensor) -> str | None:
    worst = float((result.double() - truth.double()).abs().amax() / truth.double().abs().amax())
    return None if worst <= _TOLERANCE[result.dtype] else f"off by {worst:.1e} of the largest value"
