"""w4a8_linear against the reference in fp64, on poisoned outputs, for every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_er import kernels
from sglang_er.kernels import quantize_pack, w4a8_linear, w4a16_linear
from sglang_er.kernels.reference.w4a8_linear import quantize_activations

# Kernel and reference round x alike and the products are exact integers, so what is left, per output and relative to
# sum_k |x^_k| (15 s + |z|), is the fp32 accumulation over groups, plus one rounding of the result to its dtype.
ACCUMULATION = 2.0**-21
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
# Relative error (Frobenius) of rounding normally distributed x: .55 % measured at group 32, .66 % at 128.
QUANTIZATION = 0.008
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BATCHES = [1, 2, 3, 5, 8, 17, 64]


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def check(x, packed, bias=None, out=None, out_dtype=None) -> torch.Tensor:
    exact_bias = None if bias is None else bias.double()
    expected = w4a8_linear(x.double(), packed, exact_bias, implementation="reference")
    if out is None:
        out = torch.full((x.shape[0], packed.out_features), float("nan"), dtype=out_dtype or x.dtype)
    actual = w4a8_linear(x, packed, bias, out)
    assert actual is out
    size = packed.group_size
    levels, x_scales = quantize_activations(x, size)
    rounded = levels.double() * x_scales.double().repeat_interleave(size, 1)[:, : packed.in_features]
    scales = packed.scales.double().repeat_interleave(size, 1)[:, : packed.in_features]
    zeros = packed.zeros.double().repeat_interleave(size, 1)[:, : packed.in_features]
    magnitude = rounded.abs() @ (15 * scales + zeros.abs()).T
    bound = ACCUMULATION * magnitude + ROUNDING[out.dtype] * expected.abs() + 1e-30
    if out.dtype == torch.float16:
        bound += 2.0**-25  # half the least denormal
    worst = ((actual.double() - expected).abs() / bound).max()
    assert worst <= 1, f"error is {worst:.2f} times the bound"  # NaN fails too
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_reference(isa, generator, batch, group_size, dtype):
    for rows, cols in ((16, 128), (33, 200), (130, 1000), (257, 896)):
        packed = quantize_pack(randn(rows, cols, generator=generator, dtype=dtype), group_size)
        x = randn(batch, cols, generator=generator, dtype=dtype)
        check(x, packed)
        check(x, packed, randn(rows, generator=generator, dtype=dtype))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [3, 19])
def test_every_pair_of_dtypes(isa, generator, batch, dtype, out_dtype):
    packed = quantize_pack(randn(50, 200, generator=generator))
    x = randn(batch, 200, generator=generator, dtype=dtype)
    for bias_dtype in DTYPES:
        actual = check(x, packed, randn(50, generator=generator, dtype=bias_dtype), out_dtype=out_dtype)
    assert torch.equal(w4a8_linear(x, packed, out_dtype=out_dtype), check(x, packed, out_dtype=out_dtype))
    assert actual.dtype == out_dtype and w4a8_linear(x, packed).dtype == dtype


@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (300, 1), (17, 31), (16, 129)])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("batch", [1, 4, 9, 33])
def test_edges(isa, generator, shape, batch, group_size):
    packed = quantize_pack(randn(*shape, generator=generator), group_size)
    check(randn(batch, shape[1], generator=generator), packed)


@pytest.mark.parametrize("batch", [127, 128, 129, 300])
def test_more_rows_than_one_pass(isa, generator, batch):
    packed = quantize_pack(randn(100, 256, generator=generator))
    x = randn(batch, 256, generator=generator, dtype=torch.bfloat16)
    check(x, packed)
    check(x, packed, out_dtype=torch.float32)


def test_unusual_group_sizes(isa, generator):
    for group_size in (96, 256, 1024):
        packed = quantize_pack(randn(40, 1100, generator=generator), group_size)
        check(randn(3, 1100, generator=generator), packed)


def test_integer_sums_at_their_limits(isa):
    """Every level of W and of x at its largest, one sign: the largest accumulator of every width."""
    for group_size in (32, 128, 1024):
        weight = torch.zeros(32, 2 * group_size)
        weight[:, 1:] = 15.0
        weight[:, group_size] = 0.0  # one zero in each group: scale 1, and the other levels are 15
        packed = quantize_pack(weight, group_size)
        for sign, batch in ((1.0, 5), (-1.0, 5), (1.0, 17), (-1.0, 17)):
            x = torch.full((batch, 2 * group_size), sign)
            expected = torch.full((batch, 32), sign * 15 * (2 * group_size - 2))
            torch.testing.assert_close(check(x, packed), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_input_and_output(isa, generator, dtype):
    packed = quantize_pack(randn(50, 200, generator=generator))
    x = randn(7, 333, generator=generator, dtype=dtype)[:, 11:211]
    wide = torch.full((7, 90), float("nan"), dtype=dtype)
    check(x, packed, out=wide[:, 20:70])
    assert wide[:, :20].isnan().all() and wide[:, 70:].isnan().all()  # nothing written beside the output


@pytest.mark.parametrize("group_size", [32, 64])
def test_every_output_is_written(isa, generator, group_size):
    """Fails if any block of rows, tile of x or edge is left out: the buffer starts as NaN."""
    for rows in (1, 15, 16, 17, 63, 64, 65, 100, 129):
        packed = quantize_pack(randn(rows, 96, generator=generator), group_size)
        for batch in range(1, 20):
            out = torch.full((batch, rows), float("nan"))
            w4a8_linear(randn(batch, 96, generator=generator), packed, out=out)
            assert not out.isnan().any(), (rows, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_do_not_depend_on_the_batch_or_threads(isa, generator, dtype):
    packed = quantize_pack(randn(1100, 640, generator=generator))
    x = randn(21, 640, generator=generator, dtype=dtype)
    whole = w4a8_linear(x, packed)
    for batch in (1, 2, 3, 4, 5, 7, 8, 9, 16):
        assert torch.equal(w4a8_linear(x[:batch], packed), whole[:batch])
    for threads in (1, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(w4a8_linear(x, packed), whole)


def test_vector_instruction_sets_agree_bit_for_bit(isa, generator):
    """The integers are exact; portable differs in the last bits, because it does not fuse multiply and add."""
    if isa == "portable":
        pytest.skip("rounds the products of a multiply-add")
    for group_size in (64, 128):
        packed = quantize_pack(randn(200, 1000, generator=generator), group_size)
        x = randn(130, 1000, generator=generator)
        for batch in (11, 33, 130):
            kernels.set_isa(isa)
            actual = w4a8_linear(x[:batch], packed)
            kernels.set_isa("avx2")
            assert torch.equal(w4a8_linear(x[:batch], packed), actual)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_cost_of_rounding_the_activations(isa, generator, group_size):
    """Three times as much if the zero term took the sum of the exact x: errors of x would meet s*q instead of W."""
    packed = quantize_pack(randn(512, 1024, generator=generator), group_size)
    x = randn(8, 1024, generator=generator)
    exact = w4a16_linear(x.double(), packed, implementation="reference")
    error = (w4a8_linear(x, packed).double() - exact).norm() / exact.norm()
    assert 0.2 * QUANTIZATION < error < QUANTIZATION


def test_an_outlier_costs_its_own_group_only(isa, generator):
    packed = quantize_pack(randn(64, 1024, generator=generator))
    x = randn(2, 1024, generator=generator)
    x[:, 5] = 1e3
    without = x.clone()
    without[:, :128] = 0.0
    alone = x - without
    exact = w4a16_linear(without.double(), packed, implementation="reference")
    # The group of the outlier is first: its contribution can be taken off again, up to fp32 rounding.
    rest = w4a8_linear(x, packed).double() - w4a8_linear(alone, packed).double()
    assert (rest - exact).norm() / exact.norm() < 2 * QUANTIZATION


def test_zero_input_gives_the_bias(isa, generator):
    packed = quantize_pack(randn(40, 200, generator=generator))
    bias = torch.randn(40, generator=generator)
    assert torch.equal(w4a8_linear(torch.zeros(5, 200), packed, bias), bias.expand(5, 40))


def test_row_that_is_not_finite_stays_alone(isa, generator):
    packed = quantize_pack(randn(40, 300, generator=generator))
    clean = randn(20, 300, generator=generator)
    expected = w4a8_linear(clean, packed)
    for value in (float("nan"), float("inf"), float("-inf")):
        for where in (0, 100, 255, 299):
            x = clean.clone()
            x[2, where] = value
            x[2, where - 7] = 1e30
            out = w4a8_linear(x, packed)
            assert out[2].isnan().all()
            assert w4a8_linear(x.double(), packed, implementation="reference")[2].isnan().all()
            out[2] = expected[2]
            assert torch.equal(out, expected)


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-36, 1e-33, 1e-30, 1e30, 1e35])
def test_tiny_and_huge_activations(isa, generator, size):
    packed = quantize_pack(randn(32, 256, generator=generator), 128)
    out = w4a8_linear(randn(3, 256, generator=generator) * size, packed)
    assert out.isfinite().all()
    if size >= 1e-30:
        check(randn(3, 256, generator=generator) * size, packed)


def test_denormal_and_huge_weights(isa, generator):
    for size in (1e-39, 1e30):
        packed = quantize_pack(randn(32, 256, generator=generator) * size, 128)
        check(randn(3, 256, generator=generator), packed)


def test_sees_requantization_in_place(isa, generator):
    packed = quantize_pack(randn(64, 256, generator=generator))
    x = randn(2, 256, generator=generator)
    before = w4a8_linear(x, packed)
    quantize_pack(randn(64, 256, generator=generator), out=packed)
    assert not torch.equal(check(x, packed), before)


def test_inference_mode_and_empty_batch(generator):
    packed = quantize_pack(randn(64, 256, generator=generator))
    x = randn(2, 256, generator=generator)
    expected = w4a8_linear(x, packed)
    with torch.inference_mode():
        assert torch.equal(w4a8_linear(x.clone(), packed, torch.zeros(64)), expected)
    assert w4a8_linear(x[:0], packed).shape == (0, 64)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 20),
    rows=st.integers(1, 150),
    cols=st.integers(1, 600),
    group_size=st.sampled_from([32, 64, 96, 128, 160, 512]),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    has_bias=st.booleans(),
    x_margin=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    out_margin=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_any_call(isa, batch, rows, cols, group_size, dtypes, has_bias, x_margin, out_margin, scale, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.set_num_threads(threads)
    packed = quantize_pack(0.1 * randn(rows, cols, generator=generator), group_size)
    wide_x = torch.full((batch, sum(x_margin) + cols), float("nan"), dtype=dtypes[0])
    x = wide_x[:, x_margin[0] : x_margin[0] + cols]
    x.copy_(randn(batch, cols, generator=generator) * scale)
    wide = torch.full((batch, sum(out_margin) + rows), float("nan"), dtype=dtypes[1])
    bias = randn(rows, generator=generator, dtype=dtypes[2]) if has_bias else None
    check(x, packed, bias, out=wide[:, out_margin[0] : out_margin[0] + rows])
    assert wide[:, : out_margin[0]].isnan().all() and wide[:, out_margin[0] + rows :].isnan().all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 255), "x has shape"),
        (torch.zeros(256), "x has shape"),
        (torch.zeros(256, 2).T, "rows must be contiguous"),
        (torch.zeros(2, 256, dtype=torch.float64), "float64"),
        (torch.zeros(2, 256, dtype=torch.int8), "int8"),
        (torch.zeros(2, 256, device="meta"), "x is on meta"),
    ],
)
def test_bad_input_is_one_line(x, message):
    packed = quantize_pack(torch.ones(16, 256))
    with pytest.raises((ValueError, TypeError), match=message) as error:
        w4a8_linear(x, packed)
    assert "\n" not in str(error.value)


def test_bad_bias_and_out():
    packed = quantize_pack(torch.ones(16, 256))
    x = torch.zeros(2, 256)
    with pytest.raises(ValueError, match="bias has shape"):
        w4a8_linear(x, packed, torch.zeros(15))
    with pytest.raises(TypeError, match="bias is"):
        w4a8_linear(x, packed, torch.zeros(16, dtype=torch.float64))
    with pytest.raises(ValueError, match="out has shape"):
        w4a8_linear(x, packed, out=torch.zeros(2, 17))
    with pytest.raises(TypeError, match="out is"):
        w4a8_linear(x, packed, out=torch.zeros(2, 16, dtype=torch.float64))
    with pytest.raises(TypeError, match="out is"):
        w4a8_linear(x, packed, out=torch.zeros(2, 16), out_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="out is"):
        w4a8_linear(x, packed, out_dtype=torch.int32)
