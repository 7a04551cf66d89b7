"""Triton's w4a16_linear against the reference in fp64, on poisoned outputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.linear_cases import DTYPES, check_near, packed, random

from sglang_er.kernels import PackedWeight
from sglang_er.kernels.reference import quantize_pack
from sglang_er.kernels.reference import w4a16_linear as reference
from sglang_er.kernels.triton import w4a16_linear as module
from sglang_er.kernels.triton.w4a16_linear import row_block, split_steps, w4a16_linear

# Its weight is split between programs: many inputs, few outputs.
SPLIT = (40, 1050, 32)


def run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((x.shape[0], weight.out_features), float("nan"), dtype=x.dtype)
    w4a16_linear(x, weight, bias, out)
    return out


def check(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    expected = torch.empty(x.shape[0], weight.out_features, dtype=torch.float64)
    reference.w4a16_linear(x.double(), weight, None if bias is None else bias.double(), expected)
    if out is None:
        out = run(x, weight, bias)
    else:
        w4a16_linear(x, weight, bias, out)
    check_near(out, expected, x.double(), weight)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        *[((1, 32, 32), batch) for batch in (1, 3, 8, 17)],
        *[((17, 200, 64), batch) for batch in (1, 3, 8, 17)],
        *[((16, 128, 128), 3), ((80, 520, 128), 1), ((80, 520, 128), 17), ((151, 130, 96), 3), ((151, 130, 96), 8)],
    ],
)
def test_equals_reference(shape, batch, dtype):
    weight = packed(*shape)
    x = random(batch, shape[1], seed=batch).to(dtype)
    check(x, weight, random(shape[0], seed=3).to(dtype) if batch % 2 else None)


@pytest.mark.parametrize("group_size", [160, 256, 1024])
def test_large_groups(group_size):
    check(random(3, 1100, seed=4), packed(40, 1100, group_size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 9])
def test_split_between_programs(batch, dtype):
    rows, cols, _ = SPLIT
    assert split_steps(*SPLIT)[0] > 1
    weight = packed(*SPLIT)
    check(random(batch, cols, seed=5).to(dtype), weight, random(rows, seed=6))


def test_every_step_is_taken_once():
    for rows, cols, group_size in ((1, 1, 32), (100, 32, 1024), (896, 4864, 128), (3584, 18944, 128), (64, 40000, 160)):
        splits, each = split_steps(rows, cols, group_size)
        chunks = -(-cols // group_size) * -(-group_size // 8 // module.chunk_words(group_size))
        steps = -(-chunks // module.SLOTS)
        assert (splits - 1) * each < steps <= splits * each


@pytest.mark.parametrize("batch", [33, 70])
def test_more_rows_than_a_block(batch):
    check(random(batch, 256, seed=7).half(), packed(33, 256, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(80, 520, 128), SPLIT])
def test_rows_do_not_depend_on_the_batch(shape, dtype):
    """Blocks of 8, 16 and 32 rows give the same bits for a row, wherever it lies.

    The sums inside a group are exact for these x: their order is the interpreter's BLAS here, a tensor core's there.
    What is left, the order of groups, scales and splits, is the kernel's.
    """
    weight = packed(*shape)
    x = ((random(17, shape[1], seed=8) * 16).round() / 16).to(dtype)
    whole = run(x, weight)
    for first, last in ((4, 5), (0, 5), (0, 9)):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_bias(dtype):
    check(random(3, 128, seed=11).to(dtype), packed(40, 128, 128), random(40, seed=12))


@pytest.mark.parametrize("shape", [(40, 200, 128), SPLIT])
def test_zero_input_gives_the_bias(shape):
    bias = random(shape[0], seed=13)
    assert torch.equal(run(torch.zeros(5, shape[1]), packed(*shape), bias), bias.expand(5, shape[0]))


def test_activations_are_not_quantized():
    """One activation 10^4 times the others, then none: int8 activations would lose the small ones."""
    weight = packed(64, 256, 128)
    x = random(2, 256, seed=14)
    x[:, 5] = 1e4
    check(x, weight)
    x[:, 5] = 0.0
    assert check(x, weight).abs().max() > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_row_that_is_not_finite_stays_alone(value, dtype):
    weight = packed(40, 256, 128)
    clean = random(6, 256, seed=15).to(dtype)
    x = clean.clone()
    x[2, 100] = value
    out, expected = run(x, weight), run(clean, weight)
    assert not out[2].isfinite().any()
    out[2] = expected[2]
    assert torch.equal(out, expected)


# Of shared memory, what a program may have: capabilities 7.5, 8.6 / 8.9 / 12.0, 8.0, 9.0.
TURING, ADA, AMPERE, HOPPER = (kilobytes << 10 for kilobytes in (64, 99, 163, 227))


@pytest.mark.parametrize(
    ("block_m", "dtype", "stages"),
    [
        (8, torch.bfloat16, (2, 4, 4, 4)),
        (16, torch.float16, (2, 3, 3, 3)),
        (32, torch.bfloat16, (1, 2, 3, 3)),
        (16, torch.float32, (1, 1, 2, 3)),
    ],
)
def test_a_program_has_as_many_stages_as_its_shared_memory_holds(block_m, dtype, stages):
    """With the bytes that the compiler says (compile_triton.py, of sm_90): 2 to 4 stages at groups of 128."""
    measured = {
        (8, 2): (33792, 66560, 99328),
        (16, 2): (50176, 99328, 148480),
        (32, 2): (82944, 164864, 246784),
        (16, 4): (114688, 196608, 278528),
    }[block_m, dtype.itemsize]
    most = row_block(block_m, dtype)[1]
    for limit, expected in zip((TURING, ADA, AMPERE, HOPPER), stages, strict=True):
        assert module.stages_within(limit, most, block_m, 128, dtype.itemsize) == expected
    for count, size in zip((2, 3, 4), measured):
        assert module.stages_within(size, 4, block_m, 128, dtype.itemsize) == count
        assert module.stages_within(size - 1, 4, block_m, 128, dtype.itemsize) == count - 1


def test_stages_of_other_groups():
    """Chunks of 64 inputs have half the buffers; groups above 128 have those of 128."""
    assert module.stages_within(ADA, 3, 32, 64, 2) == 3 == module.stages_within(82944, 3, 32, 64, 2)
    assert module.stages_within(82943, 3, 32, 64, 2) == 2
    assert module.stages_within(ADA, 3, 32, 1024, 2) == module.stages_within(ADA, 3, 32, 128, 2) == 2


def test_what_is_compiled_ahead_has_the_stages_of_launches():
    for kernel, signature, constants in module.SPECS:
        if kernel is module.linear_kernel and constants["GROUP"] == 128:
            dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}[signature["x"]]
            block_m, most = row_block(constants["BLOCK_M"], dtype)
            for limit in (ADA, HOPPER):
                options = module.compile_options(signature, constants, limit)
                assert options == {
                    "num_warps": module.SLOTS,
                    "num_stages": module.stages_within(limit, most, block_m, 128, dtype.itemsize),
                }


@pytest.mark.parametrize("size", [1e-39, 1e30])
def test_denormal_and_huge_weights(size):
    check(random(3, 256, seed=16), packed(32, 256, 128, size=size))


def test_sees_requantization_in_place():
    weight = packed(64, 256, 128)
    x = random(2, 256, seed=17)
    before = check(x, weight)
    quantize_pack.quantize_pack(random(64, 256, seed=18), False, weight)
    assert not torch.equal(check(x, weight), before)
