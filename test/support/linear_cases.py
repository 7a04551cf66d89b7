"""What tests of Triton's products from packed weights share: random weights, and how far a result may be off."""

from __future__ import annotations

import torch

from sglang_er.kernels import PackedWeight
from sglang_er.kernels.reference import quantize_pack

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Error allowed per output: fp32 accumulation relative to sum_k |x_k| (15 scale + |zero|), plus one rounding of the
# result to its dtype (Triton's interpreter truncates to bf16, a GPU rounds).
ACCUMULATION = 2.0**-19
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(rows: int, cols: int, group_size: int, seed: int = 1, size: float = 1.0) -> PackedWeight:
    """Rounded to bf16 by the reference; what pads it is as the layout says."""
    out = PackedWeight.empty(rows, cols, group_size)
    quantize_pack.quantize_pack(random(rows, cols, seed=seed) * size, False, out)
    return out


def check_near(out: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> None:
    """`x` fp64: what the products were made of."""
    scales, zeros = (
        part.double().repeat_interleave(weight.group_size, 1)[:, : weight.in_features]
        for part in (weight.scales, weight.zeros)
    )
    magnitude = x.abs() @ (15 * scales + zeros.abs()).T
    bound = ACCUMULATION * magnitude + ROUNDING[out.dtype] * expected.abs() + 1e-30
    worst = ((out.double() - expected).abs() / bound).max()
    assert worst <= 1, f"error is {worst:.2f} times the bound"  # NaN fails too
