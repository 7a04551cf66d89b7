"""What the wrappers of ``w4a16_linear`` and ``w4a8_linear`` share: what they serve, libraries, workspace."""

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
"""Blocks of 64 rows share the weight in L2; more rows are a dense product's."""
_SUFFIXES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def serves(op: str, x: torch.Tensor, weight: QuantizedWeight, out: torch.Tensor) -> bool:
    """Groups of 128, 16-bit x and out, at most ``MOST_ROWS`` rows, a GPU that the kernels are made for."""
    return (
        isinstance(weight, PackedWeight)
        and x.dtype in _SUFFIXES
        and out.dtype == x.dtype
        and weight.group_size == GROUP_SIZE
        and x.shape[0] <= MOST_ROWS
        and x.device.type == "cuda"
        and loader.serves(f"{op}_{_SUFFIXES[x.dtype]}", x.device)
    )


def prepared(
    op: str, x: torch.Tensor, weight: PackedWeight, out: torch.Tensor
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The library; sums of splits, if there are any; counters, whose sets `counters.py` hands out. Raises TypeError."""
    if not serves(op, x, weight, out):
        raise TypeError(
            f"{op}: the CUDA kernel does not serve {x.dtype} [{x.shape[0]}, ...] on {x.device} "
            f"with groups of {weight.group_size}"
        )
    library, counters = _loaded(op, f"{op}_{_SUFFIXES[x.dtype]}", x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    own = counters.of(x.device, stream, library.capture_id(x))
    # From the caching allocator each time: what a captured graph uses then belongs to that graph, and a stream's memory
    # is not handed to another stream while this call runs.
    values = library.partial_values(weight.out_features, weight.in_features, x.shape[0])
    return library, torch.empty(values, dtype=torch.float32, device=x.device), own


@functools.cache
def _loaded(op: str, name: str, device: torch.device) -> tuple[Any, Counters]:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: call it once before a CUDA graph is captured, its library is loaded then")
    library = loader.module(name, device)

    def zeros(of: torch.device) -> torch.Tensor:
        return torch.zeros(library.workspace_counters(), dtype=torch.int32, device=of)

    return library, Counters(zeros)
