"""``quantize_pack`` on a GPU: csrc/cuda/quantize_pack.cu."""

from __future__ import annotations

import torch

from sglang_er.kernels.base import WEIGHT_DTYPES, PackedWeight
from sglang_er.kernels.cuda import loader
from sglang_er.kernels.marlin_weight import QuantizedWeight

GROUP_SIZES = frozenset({64, 128})


def serves(weight: torch.Tensor, clip_search: bool, out: QuantizedWeight) -> bool:
    """Groups of 64 and 128, with clip search or without, a GPU that the kernels are made for."""
    del clip_search
    return (
        isinstance(out, PackedWeight)
        and weight.dtype in WEIGHT_DTYPES
        and out.group_size in GROUP_SIZES
        and weight.device.type == "cuda"
        and loader.serves("quantize_pack", weight.device)
    )


def quantize_pack(weight: torch.Tensor, clip_search: bool, out: PackedWeight) -> None:
    if not serves(weight, clip_search, out):
        raise TypeError(
            f"quantize_pack: the CUDA kernel does not serve {weight.dtype} on {weight.device} "
            f"in groups of {out.group_size}"
        )
    library = loader.module("quantize_pack", weight.device)
    library.quantize_pack(weight.detach(), out.packed, out.scales_zeros, out.group_size, clip_search)
