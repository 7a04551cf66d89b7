"""sample_rows and softmax_rows against float64, for every instruction set.

Exactness of a draw: index i is right if the coin lies between the float64 sums before and after it, which tolerates
nothing but the rounding of those sums (2**-40 of the total here, with room).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_er import kernels
from sglang_er.kernels import sample_rows, softmax_rows

LAST_COIN = 1 - 2.0**-53
VOCABULARY = 151_936
SIZES = [1, 2, 7, 31, 32, 33, 511, 512, 513, 1024, 16384, 16385, 20_000]


def coins_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_drawn(weights: torch.Tensor, coins: torch.Tensor, drawn: torch.Tensor) -> None:
    """`weights` [R, V] fp64; the interval of each drawn index holds its coin."""
    assert drawn.dtype == torch.int64 and drawn.shape == coins.shape
    assert drawn.min() >= 0 and drawn.max() < weights.shape[1]
    chosen = weights.gather(1, drawn[:, None])[:, 0]
    assert (chosen > 0).all(), "an index without weight"
    after = weights.cumsum(dim=1)
    total = after[:, -1]
    end = after.gather(1, drawn[:, None])[:, 0]
    slack = 2.0**-40 * total
    threshold = coins * total
    assert (threshold < end + slack).all() and (threshold >= end - chosen - slack).all()


def sparse(rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random weights over many orders of magnitude, half of them zero; no row without weight."""
    weights = torch.exp(6 * torch.randn(rows, size, generator=generator))
    weights *= torch.rand(rows, size, generator=generator) < 0.5
    weights[:, size // 2] += 1e-20
    return weights


@pytest.mark.parametrize("size", SIZES)
def test_the_coin_falls_into_the_index(isa, generator, size):
    weights = sparse(40, size, generator)
    coins = torch.rand(40, dtype=torch.float64, generator=generator)
    drawn = sample_rows(weights, coins)
    assert_drawn(weights.double(), coins, drawn)


def test_equals_the_reference_away_from_boundaries(isa, generator):
    """Uniform weights and coins in the middle of every interval: one right answer."""
    for size in (1, 5, 512, 700, 3000):
        indices = torch.arange(size)
        coins = (indices.double() + 0.5) / size
        weights = torch.full((1, size), 0.3).expand(size, -1)  # rows may lie on one another
        assert torch.equal(sample_rows(weights, coins), indices)
        assert torch.equal(sample_rows(weights, coins, implementation="reference"), indices)


@pytest.mark.parametrize("coin", [0.0, 5e-324, 0.5, LAST_COIN])
def test_extreme_coins_and_zeros_around(isa, coin):
    pattern = torch.zeros(1500)
    pattern[[3, 511, 512, 1100]] = torch.tensor([0.1, 0.3, 0.0, 0.7])
    weights = torch.stack([pattern * scale for scale in (1e-30, 1e-7, 1.0, 3.0, 1e30)])
    drawn = sample_rows(weights, coins_of(*[coin] * 5))
    assert drawn.tolist() == [1100 if coin >= 0.5 else 3] * 5


@pytest.mark.parametrize("coin", [0.0, 0.3, LAST_COIN])
def test_one_hot_rows(isa, coin):
    hot = torch.tensor([0, 1, 511, 512, 1023, 1024, 1299])
    weights = torch.nn.functional.one_hot(hot, 1300).float() * 1e-38
    assert torch.equal(sample_rows(weights, coins_of(*[coin] * len(hot))), hot)
    assert sample_rows(torch.ones(1, 1), coins_of(coin)).tolist() == [0]


def test_huge_dynamic_range(isa):
    """The largest float beside denormals: each is drawn exactly where its interval lies."""
    weights = torch.full((3, 2000), 1e-45)
    weights[0, 700] = 3.4e38
    weights[1, 0] = weights[1, 1999] = 3.4e38
    assert sample_rows(weights, coins_of(0.5, 0.49, 0.51025)).tolist() == [700, 0, 1020]
    weights[1, 0] = 0.0
    assert sample_rows(weights[1:2], coins_of(0.0)).tolist() == [1], "denormals are weights too"
    assert sample_rows(weights[1:2], coins_of(LAST_COIN)).tolist() == [1999]


def test_frequencies(isa, generator):
    """A million coins on a grid: each index gets its share, to the one coin at either end of its interval."""
    weights = sparse(1, 700, generator)
    draws = 20_000
    coins = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    counts = torch.bincount(sample_rows(weights.expand(draws, -1), coins), minlength=700)
    shares = weights[0].double() / weights.double().sum()
    assert ((counts / draws - shares).abs() <= 1.01 / draws).all()


@pytest.mark.parametrize("size", [1, 33, 513, 20_000])
def test_residual(isa, generator, size):
    rows, width = 24, 4
    p = torch.softmax(2 * torch.randn(rows, width, size, generator=generator), dim=-1)
    q = torch.softmax(2 * torch.randn(rows, width - 1, size, generator=generator), dim=-1)
    offsets = torch.arange(rows) % width
    coins = torch.rand(rows, dtype=torch.float64, generator=generator)
    drawn = sample_rows(p, coins, q, offsets)
    every = torch.arange(rows)
    chosen = p[every, offsets].double()
    residual = (chosen - q[every, offsets.clamp(max=width - 2)].double()).clamp(min=0.0)
    plain = (offsets == width - 1) | (residual.sum(dim=1) == 0)
    assert_drawn(torch.where(plain[:, None], chosen, residual), coins, drawn)


def test_empty_residual_falls_back_to_p(isa, generator):
    p = torch.softmax(torch.randn(3, 2, 1000, generator=generator), dim=-1)
    q = p[:, :1].clone()
    q[1] *= 1.5  # more than p everywhere
    q[2, 0, 700] = 0.0  # one index is left
    drawn = sample_rows(p, coins_of(0.4, 0.4, 0.4), q, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(drawn[:2], sample_rows(p[:2, 0], coins_of(0.4, 0.4)))
    assert drawn[2] == 700


def test_no_row_has_a_subtrahend(isa, generator):
    p = torch.rand(2, 1, 50, generator=generator)
    empty = torch.empty(2, 0, 50)
    for implementation in (None, "reference"):
        drawn = sample_rows(
            p, coins_of(0.2, 0.8), empty, torch.zeros(2, dtype=torch.int64), implementation=implementation
        )
        assert torch.equal(drawn, sample_rows(p[:, 0], coins_of(0.2, 0.8)))


def test_strided_views_give_the_same_draws(isa, generator):
    """Chains lie in larger buffers: [W, R, V] transposed, wide rows; what lies beside is NaN."""
    p, q = torch.rand(5, 3, 600, generator=generator), torch.rand(5, 2, 600, generator=generator)
    offsets, coins = torch.tensor([0, 1, 2, 1, 0]), torch.rand(5, dtype=torch.float64, generator=generator)
    expected = sample_rows(p, coins, q, offsets)
    wide = torch.full((3, 5, 640), float("nan"))
    wide[:, :, 17:617] = p.transpose(0, 1)
    behind = torch.full((2, 5, 640), float("nan"))
    behind[:, :, 5:605] = q.transpose(0, 1)
    views = wide[:, :, 17:617].transpose(0, 1), behind[:, :, 5:605].transpose(0, 1)
    assert torch.equal(sample_rows(views[0], coins, views[1], offsets), expected)


def test_draws_do_not_depend_on_rows_threads_or_instruction_set(generator):
    weights = torch.rand(9, 70_001, generator=generator)
    coins = torch.rand(9, dtype=torch.float64, generator=generator)
    expected = sample_rows(weights, coins)
    for name in kernels.supported_isas():
        kernels.set_isa(name)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(sample_rows(weights, coins), expected)
            for row in range(9):
                assert sample_rows(weights[row : row + 1], coins[row : row + 1]) == expected[row]
    kernels.set_isa("auto")


def test_a_row_without_a_sum_gives_an_index_in_range(isa):
    """Outside the contract, but the index is used as one."""
    for value in (0.0, float("nan"), float("inf"), float("-inf"), -1.0):
        drawn = sample_rows(torch.full((2, 700), value), coins_of(0.0, LAST_COIN))
        assert ((drawn >= 0) & (drawn < 700)).all()


def test_no_rows():
    assert sample_rows(torch.empty(0, 5), torch.empty(0, dtype=torch.float64)).shape == (0,)
    assert softmax_rows(torch.empty(0, 5), torch.empty(0)).shape == (0, 5)


@given(rows=st.integers(1, 6), size=st.integers(1, 1700), seed=st.integers(0, 2**31), with_q=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, size, seed, with_q):
    generator = torch.Generator().manual_seed(seed)
    weights, coins = sparse(rows, size, generator), torch.rand(rows, dtype=torch.float64, generator=generator)
    if not with_q:
        assert_drawn(weights.double(), coins, sample_rows(weights, coins))
        return
    q = weights * (torch.rand(rows, size, generator=generator) < 0.5)
    left = (weights.double() - q.double()).clamp(min=0.0)
    left = torch.where(left.sum(dim=1, keepdim=True) > 0, left, weights.double())
    drawn = sample_rows(weights[:, None], coins, q[:, None], torch.zeros(rows, dtype=torch.int64))
    assert_drawn(left, coins, drawn)


def test_bad_arguments_are_one_line():
    weights, coins, offsets = torch.ones(2, 5), coins_of(0.1, 0.2), torch.zeros(2, dtype=torch.int64)
    chain = weights[:, None]
    for call, message in (
        (lambda: sample_rows(weights[0], coins[:1]), "weights has shape"),
        (lambda: sample_rows(torch.ones(2, 0), coins), "weights has shape"),
        (lambda: sample_rows(torch.ones(5, 2).T, coins), "last dimension must be contiguous"),
        (lambda: sample_rows(weights.double(), coins), "does not serve"),
        (lambda: sample_rows(weights, coins[:1]), "coins has shape"),
        (lambda: sample_rows(weights, coins.float()), "coins is"),
        (lambda: sample_rows(chain, coins, chain), "given together"),
        (lambda: sample_rows(weights, coins, chain, offsets), "weights has shape"),
        (lambda: sample_rows(chain, coins, chain[:1], offsets), "subtract has shape"),
        (lambda: sample_rows(chain, coins, chain, offsets + 1), "offsets must be less than the width"),
        (lambda: sample_rows(chain, coins, chain, offsets.int()), "offsets is"),
        (lambda: softmax_rows(weights, torch.ones(3)), "temperatures has shape"),
        (lambda: softmax_rows(weights, torch.ones(2), torch.ones(2, 6)), "out has shape"),
        (lambda: softmax_rows(weights.double(), torch.ones(2)), "does not serve"),
    ):
        with pytest.raises((ValueError, TypeError), match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 15), (5, 33), (4, 1023), (2, 1024), (3, 1025), (2, 5000)])
def test_softmax(isa, generator, shape, dtype):
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype)
    temperatures = torch.rand(shape[0], generator=generator) + 0.3
    temperatures[0] = 1.0
    expected = torch.softmax(logits.double() / temperatures.double()[:, None], dim=-1)
    out = torch.full(shape, float("nan"))
    assert softmax_rows(logits, temperatures, out) is out
    # An absolute error in x / temperature or in a difference of two is a relative one in e^x.
    largest = (logits.double() / temperatures.double()[:, None]).abs().amax(dim=1, keepdim=True)
    assert ((out.double() - expected).abs() <= 2.0**-24 * (4 * largest + 16) * expected + 2e-38).all()
    assert torch.allclose(out.sum(dim=-1), torch.ones(shape[0]), atol=1e-5)


def test_softmax_at_a_real_vocabulary_is_closer_than_torchs(isa, generator):
    logits = 3 * torch.randn(2, VOCABULARY, generator=generator)
    exact = torch.softmax(logits.double(), dim=-1)
    actual = softmax_rows(logits, torch.ones(2)).double()
    worst = (actual / exact - 1).abs().max()
    assert worst <= 4e-6 and worst <= (torch.softmax(logits, dim=-1).double() / exact - 1).abs().max()


def test_softmax_far_apart_and_masked(isa):
    infinity = float("inf")
    logits = torch.full((4, 2500), -infinity)
    logits[0, 7] = 3.0
    logits[1, 0], logits[1, 2400] = 1e38, -1e38
    logits[2, 5] = logits[2, 2300] = -1e30
    logits[3] = 200.0
    out = softmax_rows(logits, torch.tensor([1.0, 2.0, 1.0, 0.1]))
    assert torch.equal(out[:3] > 0, out[:3] >= 0.5)
    assert [row.nonzero().flatten().tolist() for row in out[:3]] == [[7], [0], [5, 2300]]
    assert torch.allclose(out[3], torch.full((2500,), 1 / 2500))


def test_softmax_of_a_broken_row_is_nan_as_in_torch(isa, generator):
    logits = torch.randn(5, 1500, generator=generator)
    logits[1, 1400], logits[2, 3], logits[3] = float("nan"), float("inf"), float("-inf")
    out = softmax_rows(logits, torch.ones(5))
    assert torch.equal(out.isnan(), torch.softmax(logits, dim=-1).isnan())
    assert torch.equal(out[[0, 4]], softmax_rows(logits[[0, 4]], torch.ones(2)))


def test_softmax_does_not_depend_on_rows_or_threads(isa, generator):
    logits, temperatures = torch.randn(6, 40_000, generator=generator), torch.rand(6, generator=generator) + 0.5
    whole = softmax_rows(logits, temperatures)
    for threads in (1, 2, 9):
        torch.set_num_threads(threads)
        assert torch.equal(softmax_rows(logits, temperatures), whole)
        assert torch.equal(softmax_rows(logits[2:3], temperatures[2:3]), whole[2:3])


def test_softmax_of_a_strided_view(isa, generator):
    wide = torch.full((4, 700), float("nan"))
    wide[:, 30:630] = torch.randn(4, 600, generator=generator)
    temperatures = torch.full((4,), 0.7)
    out = torch.full((4, 640), -1.0)
    softmax_rows(wide[:, 30:630], temperatures, out[:, 20:620])
    assert torch.equal(out[:, 20:620], softmax_rows(wide[:, 30:630].clone(), temperatures))
    assert (out[:, :20] == -1).all() and (out[:, 620:] == -1).all()
