"""Triton's softmax_rows against fp64, within the bound that its file states."""

from __future__ import annotations

from math import log
from zlib import crc32

import pytest
import torch

from sglang_er.kernels.triton.softmax_rows import MANY_ROWS, softmax_rows

VOCABULARY = 151_936
INFINITY = float("inf")


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(request.node.nodeid.encode()))


def softmax(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    out = torch.full(logits.shape, float("nan"))
    softmax_rows(logits, temperatures, out)
    return out


def assert_within_the_bound(out: torch.Tensor, logits: torch.Tensor, temperatures: torch.Tensor) -> None:
    scaled = logits.double() / temperatures.double()[:, None]
    exact = torch.softmax(scaled, dim=-1)
    below = scaled.amax(dim=-1, keepdim=True) - scaled
    relative = 2.0**-24 * (3 * below + 3 * log(logits.shape[1]) + 16)
    allowed = torch.where(exact > 0, relative * exact, 0.0) + 2.0**-125
    assert ((out.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 33), (3, 1023), (2, 1024), (3, 1025), (9, 2500)])
def test_within_the_bound(generator: torch.Generator, shape: tuple[int, int], dtype: torch.dtype):
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype)
    temperatures = torch.rand(shape[0], generator=generator) + 0.3
    temperatures[0] = 1.0
    out = softmax(logits, temperatures)
    assert_within_the_bound(out, logits, temperatures)
    assert torch.allclose(out.sum(dim=-1), torch.ones(shape[0]), atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 100.0])
def test_any_temperature_and_a_large_common_part(generator: torch.Generator, temperature: float):
    """The bound knows the distance to the largest logit, not the size of the logits."""
    logits = torch.randn(3, 1500, generator=generator) + torch.tensor([[0.0], [3000.0], [-3000.0]])
    temperatures = torch.full((3,), temperature)
    assert_within_the_bound(softmax(logits, temperatures), logits, temperatures)


def test_a_real_vocabulary(generator: torch.Generator):
    logits, temperatures = 3 * torch.randn(1, VOCABULARY, generator=generator), torch.ones(1)
    assert_within_the_bound(softmax(logits, temperatures), logits, temperatures)


def test_far_apart_and_masked():
    logits = torch.full((5, 2500), -INFINITY)
    logits[0, 7] = 3.0
    logits[1, 0], logits[1, 2400] = 3e38, -3e38
    logits[2, 5] = logits[2, 2300] = -1e30
    logits[3] = 200.0
    logits[4] = torch.finfo(torch.float32).min  # a mask that is not infinite
    out = softmax(logits, torch.tensor([1.0, 2.0, 1.0, 0.1, 1.0]))
    assert [row.nonzero().flatten().tolist() for row in out[:3]] == [[7], [0], [5, 2300]]
    assert torch.equal(out[:3] > 0, out[:3] >= 0.5)
    assert torch.allclose(out[3:], torch.full((2, 2500), 1 / 2500))


def test_a_broken_row_is_nan_as_in_torch(generator: torch.Generator):
    logits = torch.randn(6, 2200, generator=generator)
    logits[1, 2100], logits[2, 3], logits[3] = float("nan"), INFINITY, -INFINITY
    logits[4, 1024:2048], logits[4, 2000] = -INFINITY, float("nan")
    out = softmax(logits, torch.ones(6))
    assert torch.equal(out.isnan(), torch.softmax(logits, dim=-1).isnan())
    assert torch.equal(out[[0, 5]], softmax(logits[[0, 5]], torch.ones(2)))


def test_a_row_has_the_same_bits_in_any_batch(generator: torch.Generator):
    """Also across the number of rows from which tiles are larger."""
    rows = MANY_ROWS + 1
    logits, temperatures = torch.randn(rows, 5000, generator=generator), torch.rand(rows, generator=generator) + 0.5
    whole = softmax(logits, temperatures)
    for row in (0, 3, rows - 1):
        assert torch.equal(softmax(logits[row : row + 1], temperatures[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("rows", [4, MANY_ROWS])
def test_in_place(generator: torch.Generator, rows: int):
    logits, temperatures = torch.randn(rows, 1300, generator=generator), torch.full((rows,), 0.7)
    expected = softmax(logits, temperatures)
    softmax_rows(logits, temperatures, logits)
    assert torch.equal(logits, expected)


def test_a_strided_view(generator: torch.Generator):
    wide = torch.full((4, 1400), float("nan"))
    wide[:, 30:1330] = torch.randn(4, 1300, generator=generator)
    temperatures = torch.full((4,), 0.7)
    out = torch.full((4, 1340), -1.0)
    softmax_rows(wide[:, 30:1330], temperatures, out[:, 20:1320])
    assert torch.equal(out[:, 20:1320], softmax(wide[:, 30:1330].clone(), temperatures))
    assert (out[:, :20] == -1).all() and (out[:, 1320:] == -1).all()
