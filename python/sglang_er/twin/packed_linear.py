"""One linear layer of the twin: packed int4 weights of a live parameter, remade in place when the policy changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from sglang_er import kernels
from sglang_er.kernels import PackedWeight


class PackedLinear:
    """W4 copy of one weight [N, K].

    The weight is read through `source` at every packing, never kept: a weight loader may swap the Parameter.
    The packed buffers keep their addresses for life (captured graphs read them), and the layout that was chosen for
    them when they were made; they alone are allocated inside `region()`. `own_layout`: ours, whatever else could be
    had. `clip_search`: every packing cuts outliers off where that loses less. `int8_activations` rounds the inputs to 8
    bits on the fly (W4A8) where that is faster (`kernels.int8_pays`); weights in another layout take them as they are.
    """

    def __init__(
        self,
        name: str,
        source: Callable[[], torch.Tensor],
        group_size: int,
        clip_search: bool = False,
        int8_activations: bool = False,
        region: Callable[[], AbstractContextManager[None]] = nullcontext,
        own_layout: bool = False,
    ) -> None:
        self.name = name
        self.source = source
        self.clip_search = clip_search
        self.int8_activations = int8_activations
        weight = source().detach()
        rows, cols = weight.shape
        layout = PackedWeight if own_layout else kernels.layout_for(weight, group_size)
        with region():
            self.packed = layout.empty(rows, cols, group_size, weight.dtype, weight.device)
        kernels.quantize_pack(weight, group_size, clip_search=clip_search, out=self.packed)

    def repack(self) -> None:
        """Quantize the live weight again, into the same buffers."""
        weight, group_size = self.source().detach(), self.packed.group_size
        kernels.quantize_pack(weight, group_size, clip_search=self.clip_search, out=self.packed)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype, accumulated in fp32."""
        rows = x.reshape(-1, x.shape[-1])
        if self.int8_activations and isinstance(self.packed, PackedWeight) and kernels.int8_pays(rows, self.packed):
            out = kernels.w4a8_linear(rows, self.packed, bias)
        else:
            out = kernels.w4a16_linear(rows, self.packed, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    @property
    def quantized_weights(self) -> int:
        return self.packed.out_features * self.packed.in_features

    @property
    def layout(self) -> str:
        """Whose layout the weight is in: `own` or `marlin`."""
        return "own" if isinstance(self.packed, PackedWeight) else "marlin"

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes
