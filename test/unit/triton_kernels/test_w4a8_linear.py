"""Triton's w4a8_linear against the reference in fp64, on poisoned outputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.linear_cases import DTYPES, check_near, packed, random

from sglang_er.kernels import PackedWeight, registry
from sglang_er.kernels.reference import quantize_pack
from sglang_er.kernels.reference import w4a8_linear as reference
from sglang_er.kernels.triton import w4a8_linear as module
from sglang_er.kernels.triton.w4a8_linear import split_groups, w4a8_linear

SHAPES = [(1, 64, 64), (17, 200, 64), (80, 520, 128), (151, 130, 128)]
# Its groups are split between programs: many inputs, few outputs.
SPLIT = (40, 570, 64)


def run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((x.shape[0], weight.out_features), float("nan"), dtype=x.dtype)
    w4a8_linear(x, weight, bias, out)
    return out


def rounded(x: torch.Tensor, group_size: int) -> torch.Tensor:
    levels, scales = reference.quantize_activations(x.float(), group_size)
    return levels.double() * scales.double().repeat_interleave(group_size, 1)[:, : x.shape[1]]


def check(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    expected = torch.empty(x.shape[0], weight.out_features, dtype=torch.float64)
    reference.w4a8_linear(x.double(), weight, None if bias is None else bias.double(), expected)
    if out is None:
        out = run(x, weight, bias)
    else:
        w4a8_linear(x, weight, bias, out)
    check_near(out, expected, rounded(x, weight.group_size), weight)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 17, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, batch, dtype):
    weight = packed(*shape)
    x = random(batch, shape[1], seed=batch).to(dtype)
    check(x, weight, random(shape[0], seed=3).to(dtype) if batch % 2 else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 65])
def test_split_between_programs(batch, dtype):
    rows, cols, _ = SPLIT
    assert split_groups(*SPLIT)[0] > 1
    check(random(batch, cols, seed=5).to(dtype), packed(*SPLIT), random(rows, seed=6))


def test_every_group_is_taken_once():
    for rows, cols, group_size in ((1, 1, 64), (896, 4864, 128), (3584, 18944, 128), (64, 40000, 64)):
        splits, each = split_groups(rows, cols, group_size)
        groups = -(-cols // group_size)
        assert (splits - 1) * each < groups <= splits * each


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_are_the_references_bits(dtype):
    """Where the product finds them: byte c of word j holds inputs c % 2 * 2, + 1 quarters on, of pair 2 j + c // 2."""
    x = random(5, 300, seed=7).to(dtype) * torch.tensor([1e-30, 1e-3, 1.0, 1e3, 0.0])[:, None].to(dtype)
    groups, size = 3, 128
    levels = torch.empty(5, groups, size, dtype=torch.int8)
    numbers = torch.full((5, groups, 2), float("nan"))
    module.quantize_kernel[(5 * groups,)](x, levels, numbers, 300, x.stride(0), groups, GROUP=size)
    expected, scales = reference.quantize_activations(x.float(), size)
    padded = torch.zeros(5, groups * size)
    padded[:, :300] = expected
    by_input = torch.empty(5, groups, size)
    for place in range(size):
        nibble, word, byte = place // 64, place % 64 // 4, place % 4
        by_input[:, :, (byte % 2 * 2 + nibble) * 32 + 2 * word + byte // 2] = levels[:, :, place].float()
    assert torch.equal(by_input.flatten(1), padded)
    assert torch.equal(numbers[..., 0], scales)
    assert torch.equal(numbers[..., 1], scales * padded.view(5, groups, size).sum(2))


@pytest.mark.parametrize("shape", [(80, 520, 128), SPLIT])
def test_rows_do_not_depend_on_the_batch(shape):
    """Blocks of 16, 32 and 64 rows give the same bits for a row, wherever it lies: products are exact."""
    weight, x = packed(*shape), random(70, shape[1], seed=8).bfloat16()
    whole = run(x, weight)
    for first, last in ((4, 5), (0, 17), (60, 70)):
        assert torch.equal(run(x[first:last], weight), whole[first:last])


@pytest.mark.parametrize("shape", [(50, 200, 64), SPLIT])
def test_strided_input_and_output(shape):
    rows, cols, _ = shape
    x = random(3, cols + 133, seed=9).bfloat16()[:, 11 : 11 + cols]
    wide = torch.full((3, rows + 40), float("nan"), dtype=torch.bfloat16)
    check(x, packed(*shape), out=wide[:, 20 : 20 + rows])
    assert wide[:, :20].isnan().all() and wide[:, 20 + rows :].isnan().all()  # nothing written beside the output


def test_what_lies_beside_x_does_not_leak():
    wide = torch.full((5, 300), float("nan"))
    wide[1:4, 50:250] = random(3, 200, seed=10)
    check(wide[1:4, 50:250], packed(33, 200, 128))


def test_zero_input_gives_the_bias():
    bias = random(40, seed=13)
    assert torch.equal(run(torch.zeros(5, 200), packed(40, 200, 128), bias), bias.expand(5, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_row_that_is_not_finite_stays_alone(value, dtype):
    weight = packed(40, 256, 128)
    clean = random(6, 256, seed=15).to(dtype)
    x = clean.clone()
    x[2, 100] = value
    out, expected = run(x, weight), run(clean, weight)
    assert out[2].isnan().all()
    out[2] = expected[2]
    assert torch.equal(out, expected)


def test_it_serves_groups_of_64_and_128():
    served = [
        size
        for size in (32, 64, 96, 128, 256)
        if next(entry for entry in registry.implementations("w4a8_linear") if entry.name == "triton").serves(
            torch.zeros(1, 512), PackedWeight.empty(16, 512, size), None, torch.zeros(1, 16)
        )
    ]
    assert served == [64, 128]


def test_sees_requantization_in_place():
    weight, x = packed(64, 256, 128), random(2, 256, seed=17)
    before = check(x, weight)
    quantize_pack.quantize_pack(random(64, 256, seed=18), False, weight)
    assert not torch.equal(check(x, weight), before)
