"""draft_sample: the reference against SGLang's filters, Triton's kernels against the reference, tokens against q.

Hypothesis: q is what filtered_probs gives, but for equal tokens at a boundary, which are all kept; the token is the one
that the coin falls on in q as it lies in memory, so that one without q is never drawn.
Method: exact fp64 distributions, rows of every kind of filter side by side, outputs poisoned; where the exact boundary
is nearer to a token than fp32 can tell, that token may go either way and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log, nan
from zlib import crc32

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.host_reads import HostReads
from support.properties import examples
from support.uniformity import Family, chi2_p_value

from sglang_er.kernels import draft_sample, sample_rows, softmax_rows
from sglang_er.kernels.triton.softmax_rows import MANY_ROWS
from sglang_er.sampling.filters import FilterParams, filtered_probs

VOCABULARY = 151_936
LAST_COIN = 1 - 2.0**-53
COIN_SLACK = 2.0**-40
# Masses and weights of fp32 powers: what is nearer to a boundary than this may be on either side.
NEAR = 4e-6
IMPLEMENTATIONS = ("reference", "triton")

Filters = dict[str, torch.Tensor | None]


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(request.node.nodeid.encode()))


def filters(
    top_k: Sequence[int] | None = None, top_p: Sequence[float] | None = None, min_p: Sequence[float] | None = None
) -> Filters:
    return {
        "top_ks": None if top_k is None else torch.tensor(top_k, dtype=torch.int32),
        "top_ps": None if top_p is None else torch.tensor(top_p),
        "min_ps": None if min_p is None else torch.tensor(min_p),
    }


def draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    coins: torch.Tensor,
    given: Filters,
    implementation: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Into a poisoned view of a wider buffer, nothing beside which is touched."""
    wide = torch.full((len(logits), logits.shape[1] + 24), -7.0)
    out = wide[:, 8:-16]
    tokens, q = draft_sample(logits, temperatures, coins, **given, out=out, implementation=implementation)
    assert q is out
    assert (wide[:, :8] == -7).all() and (wide[:, -16:] == -7).all()
    return tokens, q.contiguous()


def row_of(given: Filters, row: int) -> tuple[int, float, float]:
    """(top_k, top_p, min_p) of a row; what the row does not have as a filter that keeps all."""
    k, p, m = (None if column is None else column[row].item() for column in given.values())
    return int(k) if k is not None and k > 0 else 1 << 40, inf if p is None or p >= 1 else p, m or 0.0


def check_row(logits: torch.Tensor, temperature: float, given: Filters, row: int, q: torch.Tensor) -> torch.Tensor:
    """A row of q against its exact distribution; returns which tokens it keeps, of those that fp32 can hold at all."""
    k, p, m = row_of(given, row)
    exact = torch.softmax(logits.double() / temperature, dim=-1)
    ranked = exact.sort(descending=True).values
    above = torch.searchsorted(-ranked, -exact * (1 + NEAR)), torch.searchsorted(-ranked, -exact * (1 - NEAR))
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.cumsum(0)])
    must = (above[1] < k) & (mass[above[1]] <= p - NEAR) & (exact >= ranked[0] * m * (1 + NEAR))
    must |= exact == ranked[0]
    may = (above[0] < k) & (mass[above[0]] <= p + NEAR) & (exact >= ranked[0] * m * (1 - NEAR))
    kept = q > 0
    visible = exact / ranked[0] > 2.0**-120
    assert not (must & visible & ~kept).any(), "a token is missing"
    assert not (kept & ~may).any(), "a token is kept that the filters exclude"
    expected = torch.where(kept, exact, 0.0)
    expected /= expected.sum()
    below = (log(float(ranked[0])) - exact.clamp(min=1e-300).log()).clamp(min=0)
    allowed = 2.0**-24 * (3 * below + 3 * log(len(q)) + 16) * expected + 2.0**-120
    assert ((q.double() - expected).abs() <= allowed).all()
    return kept


def assert_drawn(q: torch.Tensor, coins: torch.Tensor, tokens: torch.Tensor) -> None:
    """Every token has q, and its interval holds the coin."""
    assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < q.shape[1]
    chosen = q.double().gather(1, tokens[:, None])[:, 0]
    assert (chosen > 0).all(), "a token without q was drawn"
    after = q.double().cumsum(dim=1)
    end, total = after.gather(1, tokens[:, None])[:, 0], after[:, -1]
    slack = COIN_SLACK * total
    assert (coins * total < end + slack).all() and (coins * total >= end - chosen - slack).all()


def assert_right(
    logits: torch.Tensor, temperatures: torch.Tensor, coins: torch.Tensor, given: Filters, implementation: str
) -> torch.Tensor:
    tokens, q = draw(logits, temperatures, coins, given, implementation)
    for row in range(len(logits)):
        check_row(logits[row], float(temperatures[row]), given, row, q[row])
    assert_drawn(q, coins, tokens)
    assert torch.allclose(q.double().sum(dim=1), torch.ones(len(q), dtype=torch.float64), atol=2e-6)
    return q


MIXED = (
    ("none", filters()),
    ("top-k", filters(top_k=[1, 3, 0, 1 << 30, 40, 7])),
    ("top-p", filters(top_p=[0.9, 1.0, 0.5, 1e-6, 0.99999, 0.3])),
    ("min-p", filters(min_p=[0.0, 0.02, 1.0, 0.5, 1e-4, 0.3])),
    (
        "all",
        filters(
            top_k=[0, 1, 20, 1 << 30, 500, 5], top_p=[1.0, 0.9, 0.5, 0.97, 0.6, 1.0], min_p=[0, 0, 0.1, 0.2, 0, 1e-3]
        ),
    ),
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("given_filters", [given for _, given in MIXED], ids=[name for name, _ in MIXED])
@pytest.mark.parametrize("size", [1, 33, 1025])
def test_every_filter_beside_rows_without(
    generator: torch.Generator, size: int, given_filters: Filters, implementation: str
):
    logits = 4 * torch.randn(6, size, generator=generator)
    temperatures, coins = torch.rand(6, generator=generator) + 0.4, torch.rand(6, generator=generator).double()
    coins[0], coins[-1] = 0.0, LAST_COIN
    assert_right(logits, temperatures, coins, given_filters, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_with_their_ties(generator: torch.Generator, dtype: torch.dtype, implementation: str):
    logits = (3 * torch.randn(6, 1500, generator=generator)).to(dtype)
    for _, given_filters in MIXED[1:]:
        assert_right(logits, torch.full((6,), 0.8), torch.full((6,), 0.5).double(), given_filters, implementation)


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.full), 50])
def test_a_real_vocabulary(generator: torch.Generator, k: int):
    logits = 3 * torch.randn(1, VOCABULARY, generator=generator)
    temperatures, coins = torch.full((1,), 0.9), torch.rand(1, generator=generator).double()
    given_filters = filters(top_k=[k], top_p=[0.95], min_p=[1e-4])
    tokens, q = draw(logits, temperatures, coins, given_filters)
    truth_tokens, truth = draw(logits.double(), temperatures, coins, given_filters, "reference")
    assert torch.equal(q > 0, truth > 0) and torch.equal(tokens, truth_tokens)
    assert torch.allclose(q, truth, rtol=2e-6, atol=0.0)


def test_without_filters_it_is_softmax_and_a_draw_to_the_bit(generator: torch.Generator):
    """Also at the number of rows from which tiles are larger."""
    for rows in (3, MANY_ROWS):
        logits, temperatures = torch.randn(rows, 5000, generator=generator), torch.rand(rows, generator=generator) + 0.5
        coins = torch.rand(rows, dtype=torch.float64, generator=generator)
        tokens, q = draw(logits, temperatures, coins, filters())
        assert torch.equal(q, softmax_rows(logits, temperatures, implementation="triton"))
        assert torch.equal(tokens, sample_rows(q, coins, implementation="triton"))


def test_a_row_has_the_same_bits_beside_others(generator: torch.Generator):
    rows = MANY_ROWS
    logits, temperatures = 2 * torch.randn(rows, 3000, generator=generator), torch.rand(rows, generator=generator) + 0.5
    coins = torch.rand(rows, dtype=torch.float64, generator=generator)
    given_filters = filters([0, 5, 300] + [9] * 5, [1.0, 0.9, 0.5] + [0.8] * 5, [0.0, 0.1] + [0.0] * 6)
    tokens, q = draw(logits, temperatures, coins, given_filters)
    for row in range(3):
        one = slice(row, row + 1)
        alone: Filters = {name: column[one].contiguous() for name, column in given_filters.items()}
        token, single = draw(logits[one], temperatures[one], coins[one], alone)
        assert torch.equal(single[0], q[row]) and token == tokens[row]
    unfiltered = softmax_rows(logits[:1], temperatures[:1], implementation="triton")
    assert torch.equal(q[:1], unfiltered), "a row without a filter pays for its neighbours"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_logits_are_kept_or_cut_together(implementation: str):
    flat = torch.full((4, 1300), 2.5)
    coins = torch.tensor([0.0, 0.3, 0.9, LAST_COIN], dtype=torch.float64)
    given_filters = filters(top_k=[1, 7, 1300, 0], top_p=[0.1, 1.0, 0.5, 1e-9], min_p=[1.0, 1.0, 0.5, 0.0])
    q = assert_right(flat, torch.ones(4), coins, given_filters, implementation)
    assert torch.allclose(q, torch.full_like(q, 1 / 1300), rtol=1e-6)
    stairs = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.0]]).repeat(4, 1)
    _, q = draw(stairs, torch.ones(4), coins, filters(top_k=[1, 2, 4, 5]), implementation)
    assert (q > 0).sum(dim=1).tolist() == [1, 4, 4, 6]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_boundaries_that_are_exact_in_binary(implementation: str):
    """As SGLang's: the mass before a token may equal top_p, its share of the largest may equal min_p."""
    row = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log2() * log(2)
    rows, ones = row.repeat(4, 1), torch.ones(4)
    coins = torch.full((4,), 0.5, dtype=torch.float64)
    _, q = draw(rows, ones, coins, filters(top_p=[0.5, 0.4999, 0.75, 0.0]), implementation)
    assert (q > 0).sum(dim=1).tolist() == [2, 1, 4, 1]
    _, q = draw(rows, ones, coins, filters(min_p=[0.25, 0.2501, 0.5, 1.0]), implementation)
    assert (q > 0).sum(dim=1).tolist() == [4, 2, 2, 1]
    _, q = draw(rows, ones, coins, filters(top_k=[2, 2, 1, 4], top_p=[0.5, 0.4, 0.9, 0.8]), implementation)
    assert (q > 0).sum(dim=1).tolist() == [2, 1, 1, 4], "top-p looks at the mass before top-k cut it"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("coin", [0.0, 0.5, LAST_COIN])
def test_masked_tokens_are_never_drawn(generator: torch.Generator, coin: float, implementation: str):
    logits = torch.full((5, 2500), -inf)
    kept = torch.tensor([0, 1023, 1024, 2047, 2499])
    logits[:, kept] = torch.randn(5, 5, generator=generator)
    coins = torch.full((5,), coin, dtype=torch.float64)
    for given_filters in (filters(), filters(top_k=[9, 4, 1, 0, 5]), filters(top_p=[1.0, 0.99999, 0.9, 0.5, 0.1])):
        q = assert_right(logits, torch.full((5,), 0.7), coins, given_filters, implementation)
        assert (q.sum(dim=0).nonzero().flatten()[:, None] == kept).any(dim=1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_broken_row_is_nan_and_no_other(generator: torch.Generator, implementation: str):
    logits = torch.randn(6, 2200, generator=generator)
    logits[1, 2100], logits[2, 3], logits[3], logits[4, 2000] = nan, inf, -inf, -nan
    coins = torch.rand(6, dtype=torch.float64, generator=generator)
    for given_filters in (filters(), filters([5] * 6), filters(top_p=[0.9] * 6), filters(min_p=[0.1] * 6)):
        tokens, q = draw(logits, torch.ones(6), coins, given_filters, implementation)
        assert q.isnan().all(dim=1).tolist() == [False, True, True, True, True, False]
        assert_drawn(q[[0, 5]], coins[[0, 5]], tokens[[0, 5]])
        if implementation == "triton":
            assert ((tokens >= 0) & (tokens < 2200)).all(), "it is used as an index"


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 100.0])
def test_any_temperature(generator: torch.Generator, temperature: float):
    """Cold rows have few weights that fp32 can hold, hot ones weights that are nearly equal."""
    logits = torch.randn(4, 1500, generator=generator) + torch.tensor([[0.0], [300.0], [-300.0], [0.0]])
    coins = torch.rand(4, dtype=torch.float64, generator=generator)
    given_filters = filters([3, 1400, 0, 30], [1.0, 1.0, 0.9, 0.999], [0.0, 0.0, 0.0, 0.2])
    assert_right(logits, torch.full((4,), temperature), coins, given_filters, "triton")


def params(given_filters: Filters, temperatures: torch.Tensor) -> FilterParams:
    rows = len(temperatures)
    k, p, m = given_filters.values()
    return FilterParams(
        temperatures[:, None],
        torch.ones(rows) if p is None else p,
        torch.full((rows,), 1 << 30, dtype=torch.int32) if k is None else torch.where(k > 0, k, 1 << 30),
        torch.zeros(rows) if m is None else m,
        *(column is not None for column in (p, k, m)),
    )


@pytest.mark.parametrize("given_filters", [given for _, given in MIXED], ids=[name for name, _ in MIXED])
def test_filtered_probs_up_to_ties_and_on_a_cpu_to_the_bit(generator: torch.Generator, given_filters: Filters):
    logits, temperatures = 3 * torch.randn(6, 700, generator=generator), torch.rand(6, generator=generator) + 0.5
    coins = torch.rand(6, dtype=torch.float64, generator=generator)
    expected = filtered_probs(logits, params(given_filters, temperatures))
    tokens, q = draw(logits, temperatures, coins, given_filters, "cpu")
    assert torch.equal(q, expected) and torch.equal(tokens, sample_rows(expected, coins))
    _, q = draw(logits.double(), temperatures, coins, given_filters, "reference")
    kept = q > 0
    # fp32 sums above 1 end SGLang's tail, also where top_p is 1.
    assert ((q - expected).abs() <= 4e-6 * q + 4e-6).all()
    assert (q[kept != (expected > 0)] < 1e-5).all()


ROWS = st.integers(1, 3)
VALUES = st.sampled_from([-inf, -30.0, -2.0, -0.5, 0.0, 0.125, 1.0, 1.0, 3.0, 3.5])


@given(st.data())
@examples(40, shrink=False)
def test_what_holds_for_any_row(data: st.DataObject):
    """q sums to 1, is 0 outside of the filters, holds the token, and has every token as likely as one that it has."""
    rows, size = data.draw(ROWS), data.draw(st.integers(1, 40))
    logits = torch.tensor([[data.draw(VALUES) for _ in range(size)] for _ in range(rows)])
    logits[:, data.draw(st.integers(0, size - 1))] = 2.0
    temperatures = torch.tensor([data.draw(st.floats(0.25, 4.0, width=32)) for _ in range(rows)])
    coins = torch.tensor(
        [data.draw(st.floats(0, LAST_COIN) | st.just(LAST_COIN)) for _ in range(rows)], dtype=torch.float64
    )
    given_filters = filters(
        [data.draw(st.integers(0, size + 1)) for _ in range(rows)],
        [data.draw(st.floats(0, 1, width=32)) for _ in range(rows)],
        [data.draw(st.floats(0, 1, width=32)) for _ in range(rows)],
    )
    q = assert_right(logits, temperatures, coins, given_filters, "triton")
    for row in range(rows):
        kept = q[row] > 0
        assert kept[logits[row].argmax()]
        assert not (kept[:, None] & ~kept[None, :] & (logits[row][:, None] == logits[row][None, :])).any()


@pytest.mark.parametrize(
    ("implementation", "draws"),
    [pytest.param("triton", 120, marks=pytest.mark.full), ("cpu", 100_000), ("reference", 100_000)],
)
def test_tokens_follow_q(generator: torch.Generator, implementation: str, draws: int):
    family = Family()
    logits = 1.5 * torch.randn(1, 14, generator=generator)
    for name, given_filters in (("none", filters()), ("all", filters([10], [0.95], [0.02]))):
        coins = torch.rand(draws, dtype=torch.float64, generator=generator)
        repeated: Filters = {
            key: None if column is None else column.repeat(draws) for key, column in given_filters.items()
        }
        tokens, q = draft_sample(
            logits.repeat(draws, 1), torch.ones(draws), coins, **repeated, implementation=implementation
        )
        assert (q == q[0]).all()
        family.add(name, chi2_p_value(torch.bincount(tokens, minlength=14), q[0].double() * draws))
        assert (q[0] == 0).any() == (name == "all")
    assert not family.rejected(), family.smallest()


@pytest.mark.parametrize("given_filters", [MIXED[0][1], MIXED[-1][1]], ids=["none", "all"])
def test_the_host_reads_nothing_and_launches_the_same(generator: torch.Generator, given_filters: Filters):
    """As a recorded graph needs it: whatever the values are, the same is allocated and called."""
    calls = []
    for scale in (0.0, 1.0, 9.0):
        logits = scale * torch.randn(6, 1100, generator=generator)
        with HostReads() as reads:
            draft_sample(logits, torch.ones(6), torch.zeros(6).double(), **given_filters, implementation="triton")
        assert not reads.found, reads.found
        calls.append(reads.names)
    assert calls[0] == calls[1] == calls[2] and calls[0]


def test_wrong_arguments_are_refused():
    logits, ones, coins = torch.zeros(2, 5), torch.ones(2), torch.zeros(2, dtype=torch.float64)
    for changed in (
        {"top_ks": torch.ones(2)},
        {"top_ks": torch.ones(3, dtype=torch.int32)},
        {"top_ps": coins},
        {"min_ps": torch.ones(2, 1)},
        {"out": torch.zeros(2, 4)},
        {"out": torch.zeros(2, 5, dtype=torch.float64)},
    ):
        with pytest.raises((ValueError, TypeError), match=next(iter(changed))):
            draft_sample(logits, ones, coins, **changed)
    with pytest.raises(TypeError, match="coins"):
        draft_sample(logits, ones, ones)
    with pytest.raises(ValueError, match="nothing to draw"):
        draft_sample(torch.zeros(2, 0), ones, coins)
    tokens, q = draft_sample(torch.zeros(0, 5), torch.ones(0), torch.zeros(0, dtype=torch.float64))
    assert tokens.shape == (0,) and q.shape == (0, 5)
