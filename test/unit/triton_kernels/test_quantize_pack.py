"""Triton's quantize_pack: bit for bit the reference's, into poisoned buffers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sglang_er.kernels import PackedWeight
from sglang_er.kernels.reference import quantize_pack as reference
from sglang_er.kernels.reference.dequantize import unpack_levels
from sglang_er.kernels.triton.quantize_pack import quantize_pack

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def poisoned(weight: torch.Tensor, group_size: int) -> PackedWeight:
    """Buffers whose every byte is wrong unless it is written."""
    rows, cols = weight.shape
    out = PackedWeight.empty(rows, cols, group_size, weight.dtype)
    out.packed.fill_(0xAA)
    out.scales_zeros.fill_(float("nan"))
    return out


def check(weight: torch.Tensor, group_size: int, clip_search: bool = False) -> PackedWeight:
    actual, expected = poisoned(weight, group_size), poisoned(weight, group_size)
    quantize_pack(weight, clip_search, actual)
    reference.quantize_pack(weight, clip_search, expected)
    assert torch.equal(actual.packed, expected.packed)
    assert torch.equal(actual.scales_zeros.view(torch.int16), expected.scales_zeros.view(torch.int16))
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128])
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (15, 127), (33, 200), (80, 520), (151, 33)])
def test_equals_reference_bitwise(shape, group_size, dtype):
    check(random(*shape, seed=shape[0] + group_size).to(dtype), group_size)


@pytest.mark.parametrize("group_size", [160, 256, 416, 1024])
def test_large_groups(group_size):
    check(random(20, 2100, seed=group_size).bfloat16(), group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128])
@pytest.mark.parametrize("shape", [(1, 1), (15, 127), (33, 200)])
def test_clip_search_equals_reference_bitwise(shape, group_size, dtype):
    weight = random(*shape, seed=shape[0] + group_size)
    check(weight.to(dtype), group_size, clip_search=True)
    heavy_tailed = weight / random(*shape, seed=9).abs().clamp_min(0.05)
    check(heavy_tailed.to(dtype), group_size, clip_search=True)


def test_clip_search_of_large_groups():
    check(random(20, 2100, seed=1).bfloat16(), 1024, clip_search=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_search_where_there_is_nothing_to_cut(dtype):
    """Constant weights, and some so close together that their zero lies outside of them."""
    for weight in (torch.full((17, 200), 0.7), torch.zeros(17, 200), 1.003 + 1e-3 * random(17, 200, seed=2).abs()):
        plain, clipped = check(weight.to(dtype), 128), check(weight.to(dtype), 128, clip_search=True)
        if dtype != torch.bfloat16 or weight[0, 0] == weight[0, 1]:
            assert torch.equal(plain.packed, clipped.packed) and torch.equal(plain.scales_zeros, clipped.scales_zeros)


@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e37])
def test_clip_search_of_denormal_and_large_weights(size):
    for weight in (random(16, 256, seed=3) * size, (random(16, 256, seed=3) * size).bfloat16()):
        check(weight, 128, clip_search=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_strided_weight(dtype):
    wide = random(40, 700, seed=1).to(dtype)
    check(wide[3:37, 5:645], 128)  # rows neither adjacent nor aligned


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_round_to_even(dtype):
    """Scale 1 and zero -3: weights half way between levels."""
    weight = (torch.arange(31) / 2 - 3).repeat(2)[:32].repeat(17, 4).to(dtype)
    packed = check(weight, 32)
    assert torch.equal(packed.scales, torch.ones_like(packed.scales))
    levels = unpack_levels(packed)[0, :8].tolist()
    assert levels == [0, 0, 1, 2, 2, 2, 3, 4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -0.3359375, 2.0**-14])
def test_constant_groups(dtype, value):
    packed = check(torch.full((17, 200), value, dtype=dtype), 128)
    assert not unpack_levels(packed).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_sign_and_zeros_of_both(dtype):
    weight = random(48, 256, seed=2)
    weight[1::4], weight[2::4], weight[3::8] = weight[1::4].abs(), -weight[2::4].abs(), 0.0
    weight[:16, 5], weight[:16, 130] = 0.0, -0.0
    check(weight.to(dtype), 128)


@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-37, 1e30, 1e37])
def test_denormal_and_large_weights(size):
    weight = random(16, 256, seed=3) * size
    check(weight, 128)
    check(weight.bfloat16(), 128)


@pytest.mark.parametrize("share", [0.49, 0.98, 1.0])
def test_huge_weights(share):
    """The range of a group overflows, its scale does not; zero is the largest bf16 where rounding would overflow."""
    limit = share * torch.finfo(torch.float32).max
    weight = (torch.rand(16, 256, generator=torch.Generator().manual_seed(4)) * 2 - 1) * limit
    weight[:, 0], weight[:, 1] = limit, -limit
    packed = check(weight, 128)
    assert torch.isfinite(packed.scales_zeros).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_stay_in_their_group(value):
    weight = random(16, 256, seed=5)
    clean = check(weight, 128)
    weight[3, 7] = value
    packed = poisoned(weight, 128)
    quantize_pack(weight, False, packed)
    others = torch.ones(16, 256, dtype=torch.bool)
    others[3, :128] = False
    assert torch.equal(unpack_levels(packed)[others], unpack_levels(clean)[others])
    assert unpack_levels(packed)[3, 7] == (0 if value != value else unpack_levels(packed)[3, 7])


def test_in_place_keeps_addresses():
    packed = check(random(48, 300, seed=6).bfloat16(), 128)
    addresses = packed.packed.data_ptr(), packed.scales_zeros.data_ptr()
    weight = random(48, 300, seed=7).bfloat16()
    quantize_pack(weight, False, packed)
    expected = poisoned(weight, 128)
    reference.quantize_pack(weight, False, expected)
    assert torch.equal(packed.packed, expected.packed)
    assert (packed.packed.data_ptr(), packed.scales_zeros.data_ptr()) == addresses


def test_parameter():
    check(torch.nn.Parameter(random(32, 128, seed=8)), 64)
