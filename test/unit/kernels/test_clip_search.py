"""quantize_pack with clip search: bit for bit the reference's, and the best of its candidates."""

from __future__ import annotations

import pytest
import torch

from sglang_er.kernels import PackedWeight, dequantize, quantize_pack
from sglang_er.kernels.reference.clip_search import CUTS
from sglang_er.twin.packed_linear import PackedLinear

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
SHAPES = [(1, 1), (16, 128), (15, 127), (33, 200), (64, 1024), (97, 896)]


def poisoned(weight: torch.Tensor, group_size: int) -> PackedWeight:
    """Buffers whose every byte is wrong unless it is written."""
    packed = PackedWeight.empty(*weight.shape, group_size, weight.dtype)
    packed.packed.fill_(0xA5)
    packed.scales_zeros.fill_(float("nan"))
    return packed


def equal(one: PackedWeight, other: PackedWeight) -> bool:
    scales = (packed.scales_zeros.view(torch.int16) for packed in (one, other))
    return torch.equal(one.packed, other.packed) and torch.equal(*scales)


def both(weight: torch.Tensor, group_size: int) -> PackedWeight:
    """Packs with the compiled op and the reference, into poisoned buffers, and compares."""
    actual = quantize_pack(weight, group_size, clip_search=True, out=poisoned(weight, group_size))
    expected = poisoned(weight, group_size)
    quantize_pack(weight, group_size, clip_search=True, out=expected, implementation="reference")
    assert equal(actual, expected)
    return actual


def grouped(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """fp64 ``[N, K/G, G]`` of whole groups."""
    return values.double().view(values.shape[0], -1, group_size)


def errors(packed: PackedWeight, weight: torch.Tensor) -> torch.Tensor:
    """Sum of squared errors of every group."""
    size = packed.group_size
    return (grouped(dequantize(packed), size) - grouped(weight, size)).square().sum(dim=2)


def heavy_tailed(generator: torch.Generator, *shape: int) -> torch.Tensor:
    normal, other = (torch.randn(shape, generator=generator) for _ in range(2))
    return normal / other.abs().clamp_min(0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_bitwise(isa, generator, shape, group_size, dtype):
    both(torch.randn(shape, generator=generator).to(dtype), group_size)
    both(heavy_tailed(generator, *shape).to(dtype), group_size)


@pytest.mark.parametrize("group_size", [96, 256, 1024])
def test_unusual_group_sizes(isa, generator, group_size):
    both(torch.randn(20, 2100, generator=generator).bfloat16(), group_size)


def test_row_strided_weight(isa, generator):
    wide = torch.randn(40, 700, generator=generator).bfloat16()
    packed = both(wide[3:37, 5:645], 128)  # rows neither adjacent nor aligned
    assert equal(packed, quantize_pack(wide[3:37, 5:645].contiguous(), 128, clip_search=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group_size", "share"), [(32, 0.88), (128, 0.88)])
def test_error_is_smaller_and_in_no_group_larger(isa, generator, group_size, share, dtype):
    """Larger by no more than the rounding of errors to 1/1024 of a step."""
    weight = torch.randn(96, 1024, generator=generator).to(dtype)
    plain = errors(quantize_pack(weight, group_size), weight)
    clipped = errors(quantize_pack(weight, group_size, clip_search=True), weight)
    assert (clipped <= plain * 1.005).all()
    assert clipped.sum() < share * plain.sum()


@pytest.mark.parametrize("group_size", [64, 128])
def test_the_best_candidate_is_taken(isa, generator, group_size):
    """Against all of them by plain arithmetic in fp64."""
    weight = heavy_tailed(generator, 32, 512).bfloat16()
    values = grouped(weight, group_size)
    low, scale = values.amin(dim=2), quantize_pack(weight, group_size).scales.double()
    found = []
    for bottom, top in CUTS:
        step = (scale * (64 - bottom - top) / 64).bfloat16().double().unsqueeze(2)
        zero = (low + scale * 15 * bottom / 64).bfloat16().double().unsqueeze(2)
        restored = ((values - zero) / step).round().clamp(0, 15) * step + zero
        found.append((restored - values).square().sum(dim=2))
    best = torch.stack(found).amin(dim=0)
    taken = errors(quantize_pack(weight, group_size, clip_search=True), weight)
    assert (taken <= best * 1.005).all()
    assert {int(index) for index in torch.stack(found).argmin(dim=0).flatten()} == set(range(len(CUTS)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -0.3359375, 2.0**-14, 0.7])
def test_constant_groups_are_those_without_search(isa, dtype, value):
    weight = torch.full((17, 384), value, dtype=dtype)
    assert equal(both(weight, 128), quantize_pack(weight, 128))


def test_of_equals_the_larger_range_is_taken(isa):
    """Weights that lie on the levels lose nothing."""
    weight = (torch.arange(256) % 16).repeat(32, 1).bfloat16()
    assert equal(both(weight, 128), quantize_pack(weight, 128))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_close_together_are_not_searched(isa, generator, dtype):
    """Their zero, rounded to bf16, lies many steps outside of them: there is nothing to be gained."""
    weight = (1.003 + 1e-3 * torch.rand(32, 256, generator=generator)).to(dtype)
    plain = quantize_pack(weight, 128)
    assert (plain.zeros.float() - weight.amin().float()).abs().amax() > 2 * plain.scales.float().amax()
    assert equal(both(weight, 128), plain)


def test_denormal_huge_and_one_signed_weights(isa, generator):
    limit = 0.98 * torch.finfo(torch.float32).max
    huge = (torch.rand(16, 256, generator=generator) * 2 - 1) * limit
    huge[:, 0], huge[:, 1] = limit, -limit
    normal = torch.randn(48, 512, generator=generator)
    normal[1::4], normal[2::4], normal[3::8] = normal[1::4].abs(), -normal[2::4].abs(), 0.0
    for weight in (huge, normal * 1e-39, normal * 1e-44, normal):
        for values in (weight, weight.bfloat16()):
            packed = both(values, 128)
            assert torch.isfinite(packed.scales_zeros).all() and torch.isfinite(dequantize(packed)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_stay_in_their_row(isa, generator, value):
    weight = torch.randn(16, 256, generator=generator)
    clean = dequantize(quantize_pack(weight, 128, clip_search=True))
    weight[3, 7] = value
    restored = dequantize(quantize_pack(weight, 128, clip_search=True))
    others = torch.arange(16) != 3
    assert torch.equal(restored[others], clean[others])


def test_threads_do_not_change_the_result(isa, generator):
    weight = torch.randn(1100, 640, generator=generator).bfloat16()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(quantize_pack(weight, clip_search=True))
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_a_layer_of_the_twin_is_searched_again_at_every_update(isa, generator):
    """Into the same buffers."""
    held = torch.randn(48, 300, generator=generator).bfloat16()
    layer = PackedLinear("layer", lambda: held, 128, clip_search=True)
    addresses = layer.packed.packed.data_ptr(), layer.packed.scales_zeros.data_ptr()
    assert equal(layer.packed, quantize_pack(held, clip_search=True))
    held.copy_(torch.randn(48, 300, generator=generator))
    layer.repack()
    assert equal(layer.packed, quantize_pack(held, clip_search=True))
    assert not equal(layer.packed, quantize_pack(held))
    assert (layer.packed.packed.data_ptr(), layer.packed.scales_zeros.data_ptr()) == addresses
