"""w4a16_linear against the reference in fp64, on poisoned outputs, for every instruction set."""

from __future__ import annotations

import pytest
import torch

from sglang_er.kernels import dequantize, quantize_pack, w4a16_linear

# Error allowed per output, relative to sum_k |x_k * W_k|: fp32 accumulation (the bf16 operands are 128 + q and so
# cost 4 more bits), plus one rounding of the result to its dtype.
ACCUMULATION = 2.0**-19
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
BATCHES = [1, 2, 3, 5, 8, 17, 64]


def check(x, packed, bias=None, out=None) -> torch.Tensor:
    expected = w4a16_linear(x.double(), packed, None if bias is None else bias.double(), implementation="reference")
    if out is None:
        out = torch.full((x.shape[0], packed.out_features), float("nan"), dtype=x.dtype)
    actual = w4a16_linear(x, packed, bias, out)
    assert actual is out
    # Every kernel works with s * sum(x q) + z * sum(x): the magnitudes of these terms bound the rounding error.
    scales = packed.scales.double().repeat_interleave(packed.group_size, 1)[:, : packed.in_features]
    zeros = packed.zeros.double().repeat_interleave(packed.group_size, 1)[:, : packed.in_features]
    magnitude = x.double().abs() @ (15 * scales + zeros.abs()).T
    bound = ACCUMULATION * magnitude + ROUNDING[x.dtype] * expected.abs() + 1e-30
    worst = ((actual.double() - expected).abs() / bound).max()
    assert worst <= 1, f"error is {worst:.2f} times the bound"  # NaN fails too
    return actual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_reference(isa, generator, batch, group_size, dtype):
    for rows, cols in ((16, 128), (33, 200), (130, 1000), (257, 896)):
        packed = quantize_pack(torch.randn(rows, cols, generator=generator).to(dtype), group_size)
        x = torch.randn(batch, cols, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        check(x, packed)
        check(x, packed, bias)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (300, 1), (17, 31), (16, 129)])
@pytest.mark.parametrize("batch", [1, 4, 9])
def test_edges(isa, generator, shape, batch):
    packed = quantize_pack(torch.randn(shape, generator=generator), 128)
    check(torch.randn(batch, shape[1], generator=generator), packed)


@pytest.mark.parametrize("batch", [127, 128, 129, 300])
def test_more_rows_than_one_pass(isa, generator, batch):
    packed = quantize_pack(torch.randn(100, 256, generator=generator).bfloat16())
    check(torch.randn(batch, 256, generator=generator).bfloat16(), packed)


def test_unusual_group_sizes(isa, generator):
    for group_size in (96, 256, 1024):
        packed = quantize_pack(torch.randn(40, 1100, generator=generator), group_size)
        check(torch.randn(3, 1100, generator=generator), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_input_and_output(isa, generator, dtype):
    packed = quantize_pack(torch.randn(50, 200, generator=generator).to(dtype))
    x = torch.randn(7, 333, generator=generator).to(dtype)[:, 11:211]
    wide = torch.full((7, 90), float("nan"), dtype=dtype)
    check(x, packed, out=wide[:, 20:70])
    assert wide[:, :20].isnan().all() and wide[:, 70:].isnan().all()  # nothing written beside the output


def test_every_output_is_written(isa, generator):
    """Fails if any block of rows, tile of x or edge is left out: the buffer starts as NaN."""
    for rows in (1, 15, 16, 17, 63, 64, 65, 100, 129):
        packed = quantize_pack(torch.randn(rows, 96, generator=generator), 32)
        for batch in range(1, 20):
            out = torch.full((batch, rows), float("nan"))
            w4a16_linear(torch.randn(batch, 96, generator=generator), packed, out=out)
            assert not out.isnan().any(), (rows, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_do_not_depend_on_the_batch_or_threads(isa, generator, dtype):
    packed = quantize_pack(torch.randn(1100, 640, generator=generator).to(dtype))
    x = torch.randn(21, 640, generator=generator).to(dtype)
    whole = w4a16_linear(x, packed)
    for batch in (1, 2, 3, 4, 5, 7, 8, 9, 16):
        assert torch.equal(w4a16_linear(x[:batch], packed), whole[:batch])
    for threads in (1, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(w4a16_linear(x, packed), whole)


def test_activations_are_not_quantized(isa, generator):
    """One activation 10^4 times the others: int8 activations would lose the small ones altogether."""
    packed = quantize_pack(torch.randn(64, 256, generator=generator))
    x = torch.randn(2, 256, generator=generator)
    x[:, 5] = 1e4
    check(x, packed)
    x[:, 5] = 0.0
    small = check(x, packed)
    assert small.abs().max() > 1


def test_fp32_bias_for_bf16_input(isa, generator):
    packed = quantize_pack(torch.randn(40, 128, generator=generator).bfloat16())
    bias = torch.randn(40, generator=generator)
    check(torch.randn(3, 128, generator=generator).bfloat16(), packed, bias)


def test_zero_input_gives_the_bias(isa, generator):
    packed = quantize_pack(torch.randn(40, 200, generator=generator))
    bias = torch.randn(40, generator=generator)
    assert torch.equal(w4a16_linear(torch.zeros(5, 200), packed, bias), bias.expand(5, 40))


def test_row_that_is_not_finite_stays_alone(isa, generator):
    packed = quantize_pack(torch.randn(40, 256, generator=generator))
    clean = torch.randn(6, 256, generator=generator)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = clean.clone()
        x[2, 100] = value
        out = w4a16_linear(x, packed)
        assert not out[2].isfinite().any()
        out[2] = w4a16_linear(clean, packed)[2]
        assert torch.equal(out, w4a16_linear(clean, packed))


def test_denormal_and_huge_weights(isa, generator):
    for size in (1e-39, 1e30):
        packed = quantize_pack(torch.randn(32, 256, generator=generator) * size, 128)
        check(torch.randn(3, 256, generator=generator), packed)


def test_sees_requantization_in_place(isa, generator):
    packed = quantize_pack(torch.randn(64, 256, generator=generator))
    x = torch.randn(2, 256, generator=generator)
    before = w4a16_linear(x, packed)
    quantize_pack(torch.randn(64, 256, generator=generator), out=packed)
    assert not torch.equal(check(x, packed), before)


def test_inference_mode_and_empty_batch(generator):
    packed = quantize_pack(torch.randn(64, 256, generator=generator))
    x = torch.randn(2, 256, generator=generator)
    expected = w4a16_linear(x, packed)
    with torch.inference_mode():
        assert torch.equal(w4a16_linear(x.clone(), packed, torch.zeros(64)), expected)
    assert w4a16_linear(x[:0], packed).shape == (0, 64)


@pytest.mark.parametrize("shape", [(5, 7), (64, 1024), (33, 200)])
def test_dequantize_equals_reference(isa, generator, shape):
    packed = quantize_pack(torch.randn(shape, generator=generator), 64)
    assert torch.equal(dequantize(packed), dequantize(packed, implementation="reference"))


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
    packed = quantize_pack(torch.ones(16, 256))
    with pytest.raises((ValueError, TypeError), match=message) as error:
        w4a16_linear(x, packed)
    assert "\n" not in str(error.value)


def test_bad_bias_and_out():
    packed = quantize_pack(torch.ones(16, 256))
    x = torch.zeros(2, 256)
    with pytest.raises(ValueError, match="bias has shape"):
        w4a16_linear(x, packed, torch.zeros(15))
    with pytest.raises(TypeError, match="bias is"):
        w4a16_linear(x, packed, torch.zeros(16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="out has shape"):
        w4a16_linear(x, packed, out=torch.zeros(2, 17))
    with pytest.raises(TypeError, match="out is"):
        w4a16_linear(x, packed, out=torch.zeros(2, 16, dtype=torch.bfloat16))
