"""``w4a16_linear`` of a ``MarlinWeight`` on a GPU: SGLang's `gptq_marlin_gemm`, uint4 with integer zero points."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sglang_er.kernels.base import HALF_DTYPES
from sglang_er.kernels.marlin import loader
from sglang_er.kernels.marlin.workspace import Workspace
from sglang_er.kernels.marlin_weight import MarlinWeight, QuantizedWeight

# SGLang's number for unsigned 4-bit levels with zero points of their own (its scalar_type.hpp, kU4): the mantissa's
# bits from 8 on, from 50 on that it may have IEEE NaNs.
UINT4 = 4 << 8 | 1 << 50


def serves(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> bool:
    """Whole weights in Marlin's layout whose scales have the dtype of x, bf16 or fp16; any number of rows."""
    return (
        isinstance(weight, MarlinWeight)
        and x.dtype in HALF_DTYPES
        and weight.placed_scales.dtype == x.dtype == out.dtype
        and weight.packed.is_contiguous()
        and loader.serves(x.device)
    )


def w4a16_linear(x: torch.Tensor, weight: MarlinWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if not serves(x, weight, bias, out):
        raise TypeError(f"w4a16_linear: Marlin does not serve {x.dtype} on {x.device} with a {type(weight).__name__}")
    function, workspace, empty = _prepared(x.dtype, x.device)
    # 16 bytes at a time from x, and no room between the rows of its result.
    x = x if x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    dense = out.is_contiguous() and out.data_ptr() % 16 == 0
    result = out if dense else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    with workspace.turn(x.device):
        function(
            *(x, weight.packed, weight.placed_scales, empty[0], weight.placed_zeros, empty[1], empty[1]),
            *(result, workspace.partials, empty[0], workspace.locks, UINT4),
            *(True, False, True, False),  # all of K; no atomic sums, whose order is not fixed; fp32 sums; integer zeros
        )
    if bias is not None:
        result += bias
    if not dense:
        out.copy_(result)


@functools.cache
def _prepared(dtype: torch.dtype, device: torch.device) -> tuple[Any, Workspace, tuple[torch.Tensor, torch.Tensor]]:
    """The function, its workspace, and what stands for arguments that it does without. One for all weights, kept for
    good, as CUDA graphs hold its address."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("w4a16_linear: call it once before a CUDA graph is captured, its workspace is made then")
    function = loader.module(dtype).gptq_marlin_gemm
    none = torch.empty(0, dtype=dtype, device=device), torch.empty(0, dtype=torch.int32, device=device)
    return function, Workspace.of(device), none
