"""Triton's dequantize: bit for bit the reference's (which computes in fp64), into poisoned outputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sglang_er.kernels import PackedWeight
from sglang_er.kernels.reference import dequantize as reference
from sglang_er.kernels.reference import quantize_pack
from sglang_er.kernels.triton.dequantize import dequantize


def packed(weight: torch.Tensor, group_size: int) -> PackedWeight:
    out = PackedWeight.empty(*weight.shape, group_size, weight.dtype)
    quantize_pack.quantize_pack(weight, False, out)
    return out


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(weight: PackedWeight, out: torch.Tensor | None = None) -> torch.Tensor:
    expected = torch.empty(weight.shape)
    reference.dequantize(weight, expected)
    if out is None:
        out = torch.full(weight.shape, float("nan"))
    dequantize(weight, out)
    assert torch.equal(out, expected)  # NaN fails too
    return out


@pytest.mark.parametrize("group_size", [32, 64, 96, 128])
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (17, 32), (80, 520), (151, 201)])
def test_equals_reference_bitwise(shape, group_size):
    check(packed(random(*shape, seed=shape[0] + group_size), group_size))


@pytest.mark.parametrize("group_size", [160, 256, 1024])
def test_large_groups(group_size):
    check(packed(random(20, 2100, seed=group_size), group_size))


def test_random_bits():
    """Levels, scales and zeros that no quantizer made: every level, signs of zeros, far exponents."""
    generator = torch.Generator().manual_seed(1)
    weight = PackedWeight.empty(37, 300, 64)
    weight.packed.copy_(torch.randint(0, 256, weight.packed.shape, generator=generator))
    exponents = torch.randint(-40, 40, weight.scales_zeros.shape, generator=generator)
    values = torch.randn(weight.scales_zeros.shape, generator=generator) * 2.0**exponents
    values[:, :, 0] = values[:, :, 0].abs()
    weight.scales_zeros.copy_(values)
    check(weight)


@pytest.mark.parametrize("size", [1e-39, 1e-37, 1e30, 1e37, 3e38])
def test_denormal_and_huge_weights(size):
    """15 * scale overflows where scale * q + zero does not."""
    weight = (random(16, 256, seed=2).clamp(-1, 1)) * size
    assert torch.isfinite(check(packed(weight, 128))).all()


def test_writes_nothing_beside_the_output():
    wide = torch.full((40, 300), float("nan"))
    check(packed(random(33, 200, seed=3), 128), wide[2:35, 50:250])
    assert wide[:2].isnan().all() and wide[35:].isnan().all()
    assert wide[:, :50].isnan().all() and wide[:, 250:].isnan().all()
