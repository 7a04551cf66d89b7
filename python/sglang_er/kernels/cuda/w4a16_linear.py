"""``w4a16_linear`` on a GPU: csrc/cuda/w4a16_linear.cu."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.cuda import loader
from sglang_er.kernels.cuda.counters import Counters
from sglang_er.kernels.marlin_weight import QuantizedWeight

GROUP_SIZE = 128
MOST_ROWS = 256
"""The weight is read once for 64 rows, and from about there on products bound: more rows are a dense product's."""
_LIBRARIES = {torch.bfloat16: "w4a16_linear_bf16", torch.float16: "w4a16_linear_fp16"}


def serves(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> bool:
    """Groups of 128, 16-bit x and out, at most ``MOST_ROWS`` rows, a GPU that the kernels are made for."""
    return (
        isinstance(weight, PackedWeight)
        and x.dtype in _LIBRARIES
        and out.dtype == x.dtype
        and weight.group_size == GROUP_SIZE
        and x.shape[0] <= MOST_ROWS
        and x.device.type == "cuda"
        and loader.serves(_LIBRARIES[x.dtype], x.device)
    )


def w4a16_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if not serves(x, weight, bias, out):
        raise TypeError(
            f"w4a16_linear: the CUDA kernel does not serve {x.dtype} [{x.shape[0]}, ...] on {x.device} "
            f"with groups of {weight.group_size}"
        )
    library, counters = _prepared(_LIBRARIES[x.dtype], x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    own = counters.of(x.device, stream, library.capture_id(x))
    # Sums of splits, if there are any. From the caching allocator each time: what a captured graph uses then belongs to
    # that graph, and a stream's memory is not handed to another stream while this call runs.
    values = library.partial_values(weight.out_features, weight.in_features, x.shape[0])
    partials = torch.empty(values, dtype=torch.float32, device=x.device)
    library.w4a16_linear(x, weight.packed, weight.scales_zeros, bias, out, weight.group_size, partials, own)


@functools.cache
def _prepared(name: str, device: torch.device) -> tuple[Any, Counters]:
    """The library and its counters."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("w4a16_linear: call it once before a CUDA graph is captured, its library is loaded then")
    library = loader.module(name, device)

    def zeros(of: torch.device) -> torch.Tensor:
        return torch.zeros(library.workspace_counters(), dtype=torch.int32, device=of)

    return library, Counters(zeros)
