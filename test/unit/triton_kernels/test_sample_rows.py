"""Triton's sample_rows: the drawn index holds its coin, to the rounding of fp64 sums, and always has weight."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch

from sglang_er.kernels.reference import sample_rows as reference
from sglang_er.kernels.triton import sample_rows as kernel

LAST_COIN = 1 - 2.0**-53
VOCABULARY = 151_936
POISON = -0x5555555555555556
ROUNDING = 1e-12


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(request.node.nodeid.encode()))


def draw(
    weights: torch.Tensor,
    coins: torch.Tensor,
    subtract: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.full(coins.shape, POISON)
    kernel.sample_rows(weights, subtract, offsets, coins, out)
    return out


def expected(
    weights: torch.Tensor,
    coins: torch.Tensor,
    subtract: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.full(coins.shape, POISON)
    reference.sample_rows(weights, subtract, offsets, coins, out)
    return out


def assert_drawn(weights: torch.Tensor, coins: torch.Tensor, drawn: torch.Tensor) -> None:
    """`weights` [R, V] fp64; every index has weight and its interval holds the coin, up to ROUNDING of the total."""
    assert drawn.min() >= 0 and drawn.max() < weights.shape[1]
    chosen = weights.gather(1, drawn[:, None])[:, 0]
    assert (chosen > 0).all(), "an index without weight"
    after = weights.cumsum(dim=1)
    end, total = after.gather(1, drawn[:, None])[:, 0], after[:, -1]
    threshold, slack = coins * total, ROUNDING * total
    assert (threshold < end + slack).all() and (threshold >= end - chosen - slack).all()


def wide(rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random weights over so many orders of magnitude that fp64 has to round their sums."""
    return torch.exp(8 * torch.randn(rows, size, generator=generator))


def sparse(rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random weights over many orders of magnitude, most zero in a random share; no row without weight."""
    weights = torch.exp(6 * torch.randn(rows, size, generator=generator))
    share = torch.rand(rows, 1, generator=generator) ** 3
    weights *= torch.rand(rows, size, generator=generator) < share
    weights[torch.arange(rows), torch.randint(size, (rows,), generator=generator)] += 1e-20
    return weights


def random_coins(rows: int, generator: torch.Generator) -> torch.Tensor:
    """A third of them at the ends of their range."""
    coins = torch.rand(rows, dtype=torch.float64, generator=generator)
    kind = torch.randint(6, (rows,), generator=generator)
    coins[kind == 0] = 0.0
    coins[kind == 1] = LAST_COIN
    return coins


@pytest.mark.parametrize("size", [1, 2, 31, 1023, 1024, 1025, 5000])
def test_the_coin_falls_into_the_index(generator: torch.Generator, size: int):
    weights, coins = sparse(12, size, generator), random_coins(12, generator)
    assert_drawn(weights.double(), coins, draw(weights, coins))


def test_a_real_vocabulary_equals_the_reference(generator: torch.Generator):
    weights = torch.softmax(3 * torch.randn(2, VOCABULARY, generator=generator), dim=-1)
    coins = torch.rand(2, dtype=torch.float64, generator=generator)
    drawn = draw(weights, coins)
    assert torch.equal(drawn, expected(weights, coins))
    assert_drawn(weights.double(), coins, drawn)


def test_the_middle_of_every_interval_has_one_right_answer():
    for size in (1, 5, 40):
        coins = (torch.arange(size).double() + 0.5) / size
        assert torch.equal(draw(torch.full((1, size), 0.3).expand(size, -1), coins), torch.arange(size))
    # The neighbours of the border of two blocks.
    border = torch.tensor([1022, 1023, 1024, 1025, 2047, 2048, 2999])
    coins = (border.double() + 0.5) / 3000
    assert torch.equal(draw(torch.full((1, 3000), 0.3).expand(len(border), -1), coins), border)


def test_a_coin_on_a_boundary_belongs_to_the_next_index():
    """Weights of 1: every sum is exact, and so is the answer."""
    for size in (1, 4, 2048):
        at = torch.arange(size)[:: max(1, size // 32)]
        coins = at.double() / size
        assert torch.equal(draw(torch.ones(1, size).expand(len(at), -1), coins), at)


def test_the_last_coin_before_zeros(generator: torch.Generator):
    """The sum of a row and its last prefix are added in different orders: where no prefix exceeds the coin's share, it
    is still no zero behind."""
    weights = wide(40, 2600, generator)
    weights[:, 1500:] = 0.0
    coins = torch.full((40,), LAST_COIN, dtype=torch.float64)
    assert_drawn(weights.double(), coins, draw(weights, coins))


def test_coins_at_the_end_of_a_block_before_zeros(generator: torch.Generator):
    """What lies before a block may be rounded above the coin's share: no zero at its beginning is drawn for that."""
    blocks = 24
    weights = wide(blocks, 1024, generator)
    weights[:, :300] = 0.0
    cdf = weights.double().sum(dim=1).cumsum(dim=0)
    exact = (cdf / cdf[-1])[8:-1:2]
    below, above = torch.zeros_like(exact), torch.ones_like(exact)
    coins = torch.cat([torch.nextafter(exact, below), exact, torch.nextafter(exact, above)])
    rows = weights.view(1, -1).expand(len(coins), -1)
    assert_drawn(rows.double(), coins, draw(rows, coins))


@pytest.mark.parametrize("coin", [0.0, 5e-324, 0.5, LAST_COIN])
def test_extreme_coins_and_zeros_around(coin: float):
    pattern = torch.zeros(3500)
    pattern[[3, 1023, 1024, 2100]] = torch.tensor([0.1, 0.3, 0.0, 0.7])
    weights = torch.stack([pattern * scale for scale in (1e-38, 1e-30, 1.0, 1e30)])
    drawn = draw(weights, torch.full((4,), coin, dtype=torch.float64))
    assert drawn.tolist() == [2100 if coin >= 0.5 else 3] * 4


@pytest.mark.parametrize("coin", [0.0, 0.3, LAST_COIN])
def test_one_hot_rows(coin: float):
    hot = torch.tensor([0, 1, 1023, 1024, 2047, 2048, 2499])
    weights = torch.nn.functional.one_hot(hot, 2500).float() * 1e-45
    assert (weights.sum(dim=1) > 0).all(), "denormals are weights"
    assert torch.equal(draw(weights, torch.full((7,), coin, dtype=torch.float64)), hot)


def test_huge_dynamic_range():
    weights = torch.full((4, 2000), 1e-45)
    weights[0, 700] = 3.4e38
    weights[1, 0] = weights[1, 1999] = 3.4e38
    weights[2, 0] = weights[3, 1999] = 0.0
    coins = torch.tensor([0.5, 0.49, 0.0, LAST_COIN], dtype=torch.float64)
    assert draw(weights, coins).tolist() == [700, 0, 1, 1998]


def test_coins_at_the_last_bits_of_every_boundary(generator: torch.Generator):
    """Where prefixes are compared with themselves, rounding decides between neighbours with weight, nothing else."""
    weights = sparse(1, 2100, generator)
    cdf = weights.double().cumsum(dim=1)[0]
    at = torch.randperm(2100, generator=generator)[:20]
    exact = (cdf / cdf[-1])[at].clamp(max=LAST_COIN)
    ends = torch.zeros_like(exact), torch.ones_like(exact)
    coins = torch.cat([torch.nextafter(exact, ends[0]), exact, torch.nextafter(exact, ends[1])]).clamp(max=LAST_COIN)
    rows = weights.expand(len(coins), -1)
    assert_drawn(rows.double(), coins, draw(rows, coins))


def test_adversarial_rows_by_seeded_search():
    """Shapes, shares of zeros, scales and coins at random, with and without something subtracted."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        rows, size = (int(torch.randint(1, high, (1,), generator=generator)) for high in (4, 2600))
        weights, coins = sparse(rows, size, generator), random_coins(rows, generator)
        weights *= 10.0 ** float(torch.randint(-25, 15, (1,), generator=generator))
        if seed % 2:
            assert_drawn(weights.double(), coins, draw(weights, coins))
            continue
        # Rows in which q is p itself in most places, less in few, more in some.
        factor = torch.tensor([1.0, 1.0, 1.0, 0.5, 1.5])[torch.randint(5, (rows, size), generator=generator)]
        q = weights * factor
        left = (weights.double() - q.double()).clamp(min=0.0)
        left = torch.where(left.sum(dim=1, keepdim=True) > 0, left, weights.double())
        offsets = torch.zeros(rows, dtype=torch.int64)
        assert_drawn(left, coins, draw(weights[:, None], coins, q[:, None], offsets))


@pytest.mark.parametrize("size", [1, 33, 1025, 4000])
def test_residual_equals_the_reference(generator: torch.Generator, size: int):
    rows, width = 8, 4
    p = torch.softmax(2 * torch.randn(rows, width, size, generator=generator), dim=-1)
    q = torch.softmax(2 * torch.randn(rows, width - 1, size, generator=generator), dim=-1)
    offsets = torch.arange(rows) % width
    coins = torch.rand(rows, dtype=torch.float64, generator=generator)
    assert torch.equal(draw(p, coins, q, offsets), expected(p, coins, q, offsets))


def test_empty_residual_falls_back_to_p(generator: torch.Generator):
    p = torch.softmax(torch.randn(4, 2, 2100, generator=generator), dim=-1)
    q = p[:, :1].clone()
    q[1] *= 1.5  # more than p everywhere
    q[2, 0, 1700] = 0.0  # one index is left
    q[3, 0, 5] = torch.nextafter(p[3, 0, 5], torch.tensor(0.0))  # its last bit is left
    coins = torch.full((4,), 0.4, dtype=torch.float64)
    drawn = draw(p, coins, q, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(drawn[:2], expected(p[:2, 0], coins[:2]))
    assert drawn[2:].tolist() == [1700, 5]


def test_no_row_has_a_subtrahend(generator: torch.Generator):
    p, coins = torch.rand(3, 1, 50, generator=generator), torch.rand(3, dtype=torch.float64, generator=generator)
    offsets = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(draw(p, coins, torch.empty(3, 0, 50), offsets), expected(p[:, 0], coins))


def test_strided_views_give_the_same_draws(generator: torch.Generator):
    p, q = torch.rand(5, 3, 1300, generator=generator), torch.rand(5, 2, 1300, generator=generator)
    offsets, coins = torch.tensor([0, 1, 2, 1, 0]), torch.rand(5, dtype=torch.float64, generator=generator)
    broad = torch.full((3, 5, 1340), float("nan"))
    broad[:, :, 17:1317] = p.transpose(0, 1)
    behind = torch.full((2, 5, 1340), float("nan"))
    behind[:, :, 5:1305] = q.transpose(0, 1)
    views = broad[:, :, 17:1317].transpose(0, 1), behind[:, :, 5:1305].transpose(0, 1)
    assert torch.equal(draw(views[0], coins, views[1], offsets), draw(p, coins, q, offsets))


def test_a_row_does_not_depend_on_the_others(generator: torch.Generator):
    weights, coins = torch.rand(5, 2500, generator=generator), torch.rand(5, dtype=torch.float64, generator=generator)
    drawn = draw(weights, coins)
    for row in range(5):
        assert draw(weights[row : row + 1], coins[row : row + 1]) == drawn[row]


def test_a_row_without_a_sum_gives_an_index_in_range():
    """Outside the contract, but the index is used as one."""
    coins = torch.tensor([0.0, LAST_COIN], dtype=torch.float64)
    for value in (0.0, float("nan"), float("inf"), float("-inf"), -1.0):
        drawn = draw(torch.full((2, 1500), value), coins)
        assert ((drawn >= 0) & (drawn < 1500)).all()
