"""bf16_linear against fp64, on poisoned outputs, for every instruction set and every pair of dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_er import kernels
from sglang_er.kernels import bf16_linear

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BFLOAT16, FLOAT16, FLOAT32]
# Error allowed per output, relative to sum_k |x_k * W_k|: a lane adds K / 16 products in fp32, then 4 more
# additions (a tile all K of them); plus one rounding of the result to its dtype.
ROUNDING = {BFLOAT16: 2.0**-8, FLOAT16: 2.0**-10, FLOAT32: 2.0**-23}


def as_multiplied(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x as the active instruction set multiplies it: dot products of bf16 pairs round it, once and to nearest even."""
    dots = kernels.isa() in ("amx", "avx512_bf16") and weight.dtype == BFLOAT16
    return x.bfloat16() if dots else x


def check(x, weight, bias=None, out=None, out_dtype=None) -> torch.Tensor:
    out_dtype = out_dtype or (x.dtype if out is None else out.dtype)
    given, x = x, as_multiplied(x, weight)
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    if out is None:
        out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=out_dtype)
    actual = bf16_linear(given, weight, bias, out)
    assert actual is out
    tiles = kernels.isa() == "amx" and weight.dtype == BFLOAT16
    depth = x.shape[1] / (1 if tiles else 16) + 6
    magnitude = x.double().abs() @ weight.double().abs().T + (0.0 if bias is None else bias.double().abs())
    bound = depth * 2.0**-23 * magnitude + ROUNDING[out_dtype] * expected.abs() + 1e-7 * (out_dtype == FLOAT16)
    wrong = (actual.double() - expected).abs() > bound + 1e-37
    assert not wrong.any() and not actual.isnan().any()
    return actual


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(isa, generator, dtype, weight_dtype):
    for rows, cols in ((16, 128), (33, 200), (130, 1100), (257, 896)):
        weight = torch.randn(rows, cols, generator=generator).to(weight_dtype)
        bias = torch.randn(rows, generator=generator)
        for batch in (1, 2, 3, 4, 5, 6, 7, 8, 17):
            x = torch.randn(batch, cols, generator=generator).to(dtype)
            check(x, weight)
            check(x, weight, bias.to(dtype), out_dtype=FLOAT32)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_types_of_bias_and_output(isa, generator, bias_dtype, out_dtype):
    weight = torch.randn(40, 96, generator=generator).bfloat16()
    bias = torch.randn(40, generator=generator).to(bias_dtype)
    x = torch.randn(3, 96, generator=generator)
    check(x, weight, bias, out_dtype=out_dtype)
    assert bf16_linear(x, weight, bias, out_dtype=out_dtype).dtype == out_dtype


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (300, 1), (17, 31), (16, 33), (5, 15), (20, 1024), (20, 2049)])
@pytest.mark.parametrize("batch", [1, 4, 9])
def test_edges(isa, generator, shape, batch, weight_dtype):
    weight = torch.randn(shape, generator=generator).to(weight_dtype)
    check(torch.randn(batch, shape[1], generator=generator), weight)


@pytest.mark.parametrize("batch", [63, 64, 65, 128, 129, 300])
def test_more_rows_than_one_pass(isa, generator, batch):
    weight = torch.randn(100, 256, generator=generator).bfloat16()
    check(torch.randn(batch, 256, generator=generator).bfloat16(), weight)


def test_long_rows_make_shorter_passes(isa, generator):
    weight = torch.randn(9, 9001, generator=generator).bfloat16()
    x = torch.randn(61, 9001, generator=generator)
    whole = check(x, weight)
    assert torch.equal(bf16_linear(x[40:41], weight), whole[40:41])


@given(
    batch=st.integers(1, 80),
    rows=st.integers(1, 70),
    cols=st.integers(1, 1300),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    padding=st.integers(0, 3),
    isa=st.sampled_from(kernels.supported_isas()),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(batch, rows, cols, dtypes, padding, isa, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols + padding, generator=generator).to(dtypes[0])[:, padding:]
    x = torch.randn(batch, cols + padding, generator=generator).to(dtypes[1])[:, padding:]
    kernels.set_isa(isa)
    try:
        check(x, weight, out_dtype=dtypes[2])
    finally:
        kernels.set_isa("auto")


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_strided_tensors(isa, generator, weight_dtype):
    """What lies beside the tensors is NaN: it must neither be used nor written."""

    def beside(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        wide = torch.full((rows, cols + 60), float("nan"), dtype=dtype)
        wide[:, 11 : 11 + cols] = torch.randn(rows, cols, generator=generator)
        return wide

    x, weight = beside(7, 201, FLOAT32)[:, 11:212], beside(50, 201, weight_dtype)[:, 11:212]
    wide = torch.full((7, 90), float("nan"))
    check(x, weight, out=wide[:, 20:70])
    assert wide[:, :20].isnan().all() and wide[:, 70:].isnan().all()


def test_every_output_is_written(isa, generator):
    """Fails if any block of rows, tile of x or edge is left out: the buffer starts as NaN."""
    for rows in (1, 3, 4, 7, 8, 15, 16, 17, 63, 64, 65, 100, 129):
        weight = torch.randn(rows, 40, generator=generator).bfloat16()
        for batch in range(1, 20):
            out = torch.full((batch, rows), float("nan"))
            bf16_linear(torch.randn(batch, 40, generator=generator), weight, out=out)
            assert not out.isnan().any(), (rows, batch)


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch_or_threads(isa, generator, weight_dtype):
    weight = torch.randn(1101, 2200, generator=generator).to(weight_dtype)
    x = torch.randn(67, 2200, generator=generator)
    whole = bf16_linear(x, weight)
    for batch in (1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 66):
        assert torch.equal(bf16_linear(x[:batch], weight), whole[:batch])
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for batch in (1, 9, 67):
            assert torch.equal(bf16_linear(x[:batch], weight), whole[:batch])


def test_outputs_do_not_depend_on_the_other_outputs(isa, generator):
    """A slice of the weight (a layer split over ranks) gives the same bits as the whole."""
    weight = torch.randn(100, 333, generator=generator).bfloat16()
    x = torch.randn(5, 333, generator=generator)
    whole = bf16_linear(x, weight)
    for begin, end in ((0, 1), (3, 50), (37, 100)):
        assert torch.equal(bf16_linear(x, weight[begin:end]), whole[:, begin:end])


def test_row_that_is_not_finite_stays_alone(isa, generator):
    weight = torch.randn(40, 300, generator=generator).bfloat16()
    clean = torch.randn(9, 300, generator=generator)
    expected = bf16_linear(clean, weight)
    for value in (float("nan"), float("inf"), float("-inf")):
        for column in (100, 299):
            x = clean.clone()
            x[2, column] = value
            out = bf16_linear(x, weight)
            assert not out[2].isfinite().any()
            out[2] = expected[2]
            assert torch.equal(out, expected)


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weight_that_is_not_finite_reaches_its_output_only(isa, generator, weight_dtype):
    weight = torch.randn(40, 300, generator=generator).to(weight_dtype)
    x = torch.randn(3, 300, generator=generator)
    expected = bf16_linear(x, weight)
    for column in (0, 1, 298, 299):
        broken = weight.clone()
        broken[7, column] = float("nan")
        out = bf16_linear(x, broken)
        assert out[:, 7].isnan().all()
        out[:, 7] = expected[:, 7]
        assert torch.equal(out, expected)


def test_sees_a_weight_update_in_place(isa, generator):
    """The live parameter is read: there is no copy to go stale."""
    weight = torch.randn(64, 256, generator=generator).bfloat16()
    x = torch.randn(2, 256, generator=generator)
    before = bf16_linear(x, weight)
    weight.mul_(2)
    assert torch.equal(bf16_linear(x, weight), 2 * before)


def test_small_and_huge_weights(isa, generator):
    for size in (1e-30, 1e30):
        check(torch.randn(3, 256, generator=generator), (torch.randn(32, 256, generator=generator) * size).bfloat16())


def test_empty_shapes_and_inference_mode(isa, generator):
    weight = torch.randn(64, 256, generator=generator).bfloat16()
    x = torch.randn(2, 256, generator=generator)
    assert bf16_linear(x[:0], weight).shape == (0, 64)
    assert bf16_linear(x, weight[:0]).shape == (2, 0)
    bias = torch.randn(64, generator=generator)
    assert torch.equal(bf16_linear(x[:, :0], weight[:, :0], bias), bias.expand(2, 64))
    with torch.inference_mode():
        assert torch.equal(bf16_linear(x.clone(), weight), bf16_linear(x, weight))


def test_reference_is_the_formula(generator):
    weight, x = torch.randn(20, 30, generator=generator).bfloat16(), torch.randn(4, 30, generator=generator)
    expected = torch.nn.functional.linear(x.double(), weight.double())
    assert torch.equal(bf16_linear(x.double(), weight.double(), implementation="reference"), expected)
    assert torch.allclose(bf16_linear(x, weight, implementation="reference").double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 255), "x has shape"),
        (torch.zeros(256), "x has shape"),
        (torch.zeros(2, 3, 256), "x has shape"),
        (torch.zeros(256, 2).T, "rows must be contiguous"),
        (torch.zeros(2, 256, dtype=torch.float64), "float64"),
        (torch.zeros(2, 256, dtype=torch.int32), "int32"),
        (torch.zeros(2, 256, device="meta"), "x is on meta"),
    ],
)
def test_bad_input_is_one_line(x, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        bf16_linear(x, torch.ones(16, 256))
    assert "\n" not in str(error.value)


def test_bad_weight_bias_and_out():
    weight, x = torch.ones(16, 256).bfloat16(), torch.zeros(2, 256)
    with pytest.raises(ValueError, match="weight has strides"):
        bf16_linear(x, torch.ones(256, 16).T)
    with pytest.raises(TypeError, match="weight is"):
        bf16_linear(x, weight.to(torch.int8))
    with pytest.raises(ValueError, match="bias has shape"):
        bf16_linear(x, weight, torch.zeros(15))
    with pytest.raises(TypeError, match="bias is"):
        bf16_linear(x, weight, torch.zeros(16, dtype=torch.float64))
    with pytest.raises(ValueError, match="out has shape"):
        bf16_linear(x, weight, out=torch.zeros(2, 17))
    with pytest.raises(TypeError, match="out is"):
        bf16_linear(x, weight, out=torch.zeros(2, 16), out_dtype=BFLOAT16)
    with pytest.raises(TypeError, match="out is"):
        bf16_linear(x, weight, out_dtype=torch.int32)
