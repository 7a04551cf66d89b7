"""quantize_pack: bit for bit the reference's, and the error that round-to-nearest promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sglang_er.kernels import PackedWeight, dequantize, quantize_pack
from sglang_er.kernels.reference.dequantize import unpack_levels

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
SHAPES = [(1, 1), (16, 128), (15, 127), (33, 200), (64, 1024), (97, 896), (130, 1000)]


def poisoned(rows: int, cols: int, group_size: int, dtype: torch.dtype) -> PackedWeight:
    """Buffers whose every byte is wrong unless it is written."""
    weight = PackedWeight.empty(rows, cols, group_size, dtype)
    weight.packed.fill_(0xA5)
    weight.scales_zeros.fill_(float("nan"))
    return weight


def assert_bitwise(actual: PackedWeight, expected: PackedWeight) -> None:
    assert torch.equal(actual.packed, expected.packed)
    assert torch.equal(actual.scales_zeros.view(torch.int16), expected.scales_zeros.view(torch.int16))


def both(weight: torch.Tensor, group_size: int) -> PackedWeight:
    """Packs with the compiled op and the reference, into poisoned buffers, and compares."""
    rows, cols = weight.shape
    actual = quantize_pack(weight, group_size, out=poisoned(rows, cols, group_size, weight.dtype))
    expected = poisoned(rows, cols, group_size, weight.dtype)
    quantize_pack(weight, group_size, out=expected, implementation="reference")
    assert_bitwise(actual, expected)
    return actual


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """fp64 ``[N, K/G, G]``, the last group filled up with its last weight."""
    padding = -weight.shape[1] % group_size
    padded = torch.cat([weight, weight[:, -1:].expand(-1, padding)], dim=1)
    return padded.double().view(weight.shape[0], -1, group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_bitwise(isa, generator, shape, group_size, dtype):
    weight = torch.randn(shape, generator=generator).to(dtype)
    both(weight, group_size)


@pytest.mark.parametrize("group_size", [96, 256, 1024])
def test_unusual_group_sizes(isa, generator, group_size):
    both(torch.randn(20, 2100, generator=generator).bfloat16(), group_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_strided_weight(isa, generator, dtype):
    wide = torch.randn(40, 700, generator=generator).to(dtype)
    packed = both(wide[3:37, 5:645], 128)  # rows neither adjacent nor aligned
    assert_bitwise(packed, quantize_pack(wide[3:37, 5:645].contiguous(), 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 128])
def test_error_is_at_most_half_a_step(isa, generator, group_size, dtype):
    """|W - w| <= scale/2 + what rounding scale and zero to bf16 costs (2^-9 of 15 steps, and of zero)."""
    weight = torch.randn(50, 512, generator=generator).to(dtype)
    packed = quantize_pack(weight, group_size)
    error = (grouped(dequantize(packed), group_size) - grouped(weight, group_size)).abs().amax(dim=2)
    scales, zeros = packed.scales.double(), packed.zeros.double()
    bound = scales * (0.5 + 15 * 2**-9) + (zeros.abs() * 2**-8 if dtype is torch.float32 else 0)
    assert (error <= bound).all()
    spread = grouped(weight, group_size).amax(dim=2) - grouped(weight, group_size).amin(dim=2)
    assert (scales * 15 / spread - 1).abs().max() < 2**-8


def test_all_levels_are_used(isa, generator):
    levels = unpack_levels(quantize_pack(torch.rand(64, 4096, generator=generator), 128))
    assert torch.bincount(levels.flatten().int(), minlength=16).min() > 0.02 * levels.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -0.3359375, 2.0**-14])
def test_constant_groups_come_back_exactly(isa, dtype, value):
    weight = torch.full((17, 384), value, dtype=dtype)
    packed = both(weight, 128)
    assert torch.equal(dequantize(packed), weight.float())
    assert not unpack_levels(packed).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_constant_groups_that_bf16_cannot_hold(isa, dtype):
    """Far more steps off their zero than there are integers."""
    packed = both(torch.full((17, 384), 0.7, dtype=dtype), 128)
    assert (dequantize(packed) - 0.7).abs().max() <= 0.7 * 2**-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_sign(isa, generator, dtype):
    """Mixed, positive, negative and zero rows in one block; a zero of either sign is a weight like others."""
    weight = torch.randn(48, 512, generator=generator)
    weight[1::4], weight[2::4], weight[3::8] = weight[1::4].abs(), -weight[2::4].abs(), 0.0
    weight[:16, 5], weight[:16, 130] = 0.0, -0.0
    both(weight.to(dtype), 128)


def test_denormal_weights(isa, generator):
    tiny = torch.randn(16, 256, generator=generator) * 1e-39
    for weight in (tiny, tiny.bfloat16()):
        packed = both(weight, 128)
        assert (dequantize(packed).double() - weight.double()).abs().max() <= 2.0**-126


@pytest.mark.parametrize("share", [0.49, 0.98])
def test_huge_weights(isa, generator, share):
    """Scales and zeros stay finite; while the range of a group is below the largest number, so does precision."""
    limit = share * torch.finfo(torch.float32).max
    weight = (torch.rand(16, 256, generator=generator) * 2 - 1) * limit
    weight[:, 0], weight[:, 1] = limit, -limit
    for values in (weight, weight.bfloat16()):
        packed = both(values, 128)
        restored = dequantize(packed)
        assert torch.isfinite(packed.scales_zeros).all() and torch.isfinite(restored).all()
        if share < 0.5:
            error = (restored.double() - values.double()).abs()
            assert error.max() <= packed.scales.double().max() * 0.6


def test_outlier_does_not_leak_into_other_groups(isa, generator):
    weight = torch.randn(16, 384, generator=generator)
    plain = dequantize(quantize_pack(weight, 128))
    weight[:, 130] = 1e4
    with_outlier = dequantize(quantize_pack(weight, 128))
    assert torch.equal(plain[:, :128], with_outlier[:, :128])
    assert torch.equal(plain[:, 256:], with_outlier[:, 256:])


def test_weights_that_are_not_finite_do_not_crash(isa):
    for value in (float("nan"), float("inf"), float("-inf")):
        weight = torch.ones(16, 128)
        weight[3, 7] = value
        levels = unpack_levels(quantize_pack(weight, 128))
        assert torch.equal(levels[4:], torch.zeros_like(levels[4:]))


def test_in_place_keeps_addresses(isa, generator):
    packed = quantize_pack(torch.randn(48, 300, generator=generator).bfloat16())
    addresses = packed.packed.data_ptr(), packed.scales_zeros.data_ptr()
    weight = torch.randn(48, 300, generator=generator).bfloat16()
    assert quantize_pack(weight, out=packed) is packed
    assert (packed.packed.data_ptr(), packed.scales_zeros.data_ptr()) == addresses
    assert_bitwise(packed, quantize_pack(weight))


@pytest.mark.parametrize("shape", [(1152, 896), (896, 4864), (151936, 896), (2048, 1536), (18944, 3584), (4096, 4096)])
def test_memory_within_five_percent(shape):
    """Layer sizes of Qwen2.5 0.5B, 1.5B and 7B."""
    packed = PackedWeight.empty(*shape, group_size=128, device="meta")
    assert 4.25 <= packed.bits_per_weight <= 4.25 * 1.05


def test_threads_do_not_change_the_result(isa, generator):
    weight = torch.randn(1100, 640, generator=generator).bfloat16()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(quantize_pack(weight))
    assert_bitwise(results[0], results[1])
    assert_bitwise(results[0], results[2])


def test_unaligned_buffers(isa, generator):
    """Streaming stores need 64-byte alignment; buffers cut from an arena may not have it."""
    weight = torch.randn(32, 256, generator=generator).bfloat16()
    expected = quantize_pack(weight)
    arena = torch.zeros(expected.packed.numel() + 8, dtype=torch.uint8)
    packed = arena[8:].view(expected.packed.shape)
    assert packed.data_ptr() % 64
    assert_bitwise(quantize_pack(weight, out=dataclasses.replace(expected, packed=packed)), expected)


def test_parameter_and_inference_mode(generator):
    parameter = torch.nn.Parameter(torch.randn(32, 128, generator=generator))
    expected = quantize_pack(parameter.detach())
    assert_bitwise(quantize_pack(parameter), expected)
    with torch.inference_mode():
        assert_bitwise(quantize_pack(parameter.clone()), expected)


@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.zeros(4, 128), 48, "group_size 48"),
        (torch.zeros(4, 128), 0, "group_size 0"),
        (torch.zeros(4, 128), 2048, "group_size 2048"),
        (torch.zeros(4), 128, "expected"),
        (torch.zeros(0, 128), 128, "nothing to quantize"),
        (torch.zeros(4, 0), 128, "nothing to quantize"),
        (torch.zeros(128, 4).T, 128, "rows must be contiguous"),
        (torch.zeros(128).expand(4, 128), 128, "rows must not overlap"),
        (torch.zeros(4, 128, dtype=torch.int32), 128, "int32"),
        (torch.zeros(4, 128, dtype=torch.float64), 128, "float64"),
    ],
)
def test_bad_arguments_are_one_line(weight, group_size, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        quantize_pack(weight, group_size)
    assert "\n" not in str(error.value)


def test_out_of_another_shape_is_refused():
    out = quantize_pack(torch.zeros(16, 256), 128)
    for weight, group_size in ((torch.zeros(16, 255), 128), (torch.zeros(17, 256), 128), (torch.zeros(16, 256), 64)):
        with pytest.raises(ValueError, match="out was made for"):
            quantize_pack(weight, group_size, out=out)
