"""Humming's W4A16 product (the package `humming-kernels`, which SGLang brings), measured beside our implementations of
`w4a16_linear`. It is none of them: all of it needs a GPU, so nothing of it could be tested here.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from .kernel_makers import relative
from .sections import CellError, Skip

# A weight of 4 bits is off by a tenth of its norm, and so is a product of random x; a wrong layout by all of it.
MOST_ERROR = 0.2


@dataclass(frozen=True)
class Linear:
    """One `HummingLayer`; `nbytes`: of its weight with scales and zero points."""

    layer: Any
    nbytes: int

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x, outputs=out)
        return result


def linear(weight: torch.Tensor, group_size: int, device: str) -> Linear:
    """`weight` bf16 [N, K] on a GPU, quantized by Humming itself: unsigned levels, integer zero points, as Marlin's.
    Raises Skip where it cannot be had."""
    if device != "cuda":
        raise Skip("humming serves GPUs only")
    try:
        from humming.layer import HummingLayer
    except ImportError as missing:
        raise Skip(f"humming-kernels is not installed: {missing}") from None
    rows, cols = weight.shape
    config = {"dtype": "int4", "group_size": group_size, "has_zero_point": True}
    layer = HummingLayer(shape_n=rows, shape_k=cols, weight_config=config, torch_dtype=weight.dtype).to(device)
    layer.load_from_unquantized(weight)
    layer.transform()
    return Linear(layer, sum(parameter.nbytes for parameter in layer.parameters()))


def copy(of: Linear) -> Linear:
    """The same weight in other memory."""
    return Linear(deepcopy(of.layer), of.nbytes)


def check(found: Linear, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises CellError where its product is not that of a weight of 4 bits."""
    out = x.new_full((x.shape[0], weight.shape[0]), torch.nan)
    error = relative(found(x, out), functional.linear(x.float(), weight.float()))
    if not error <= MOST_ERROR:
        raise CellError(f"humming's product of {x.shape[0]} rows is off by {error:.1e} of its norm")
