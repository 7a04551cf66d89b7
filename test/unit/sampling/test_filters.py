"""The filters are SGLang's: same support, same probabilities, same ties, for every combination of parameters.

Hypothesis: filtered_probs is the normalized distribution that SGLang's `pytorch` sampling backend draws from.
Method: SGLang's own function returns its filtered weights, which are compared row by row; hand-written rows with
probabilities that are exact in binary fix each boundary. If broken: supports differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sglang_er.compat import torchvision_shim
from sglang_er.sampling.filters import FilterParams, filtered_probs

TOP_K_ALL = 1 << 30
TOP_K = (1, 2, 20, 1000, TOP_K_ALL)
TOP_P = (0.05, 0.5, 0.9, 1.0)
MIN_P = (0.0, 0.02, 0.3, 1.0)


@pytest.fixture(scope="module")
def sglang_sampler():
    torchvision_shim.install()
    from sglang.srt.layers import sampler

    return sampler


def params(
    rows: int,
    temperature: float | Sequence[float] = 1.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = TOP_K_ALL,
    min_p: float | Sequence[float] = 0.0,
) -> FilterParams:
    def column(value: float | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([value] * rows if isinstance(value, int | float) else list(value), dtype=dtype)

    top_ps, top_ks, min_ps = column(top_p, torch.float32), column(top_k, torch.int32), column(min_p, torch.float32)
    return FilterParams(
        column(temperature, torch.float32)[:, None],
        top_ps,
        top_ks,
        min_ps,
        need_top_p=bool((top_ps < 1).any()),
        need_top_k=bool((top_ks != TOP_K_ALL).any()),
        need_min_p=bool((min_ps > 0).any()),
    )


def sglang_filtered(sampler, logits: torch.Tensor, given: FilterParams) -> torch.Tensor:
    """What SGLang draws from, normalized and in vocabulary order."""
    probs = torch.softmax(logits / given.temperatures, dim=-1)
    _, kept, order, _ = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        probs, given.top_ks, given.top_ps, given.min_ps, given.need_min_p, None, None, return_filtered_probs=True
    )
    kept = kept / kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order.to(torch.int64), kept)


def assert_equal_to_sglang(sampler, logits: torch.Tensor, given: FilterParams) -> None:
    before = logits.clone()
    actual = filtered_probs(logits, given)
    expected = sglang_filtered(sampler, logits, given)
    assert torch.equal(logits, before), "the caller's logits were changed"
    assert actual.dtype == torch.float32
    assert torch.equal(actual > 0, expected > 0), "supports differ"
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(actual.sum(dim=-1), torch.ones(len(actual)), rtol=1e-5, atol=0.0)


def of_probs(*probs: float) -> torch.Tensor:
    """One row of logits whose softmax is `probs`, which are powers of two or zero."""
    return torch.tensor([probs]).log()


def kept(logits: torch.Tensor, **given: float) -> list[float]:
    return [round(value, 4) for value in filtered_probs(logits, params(1, **given))[0].tolist()]


@pytest.mark.parametrize("vocabulary", [2, 37, 320, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_random_rows_with_every_combination_of_parameters(sglang_sampler, vocabulary: int, spread: float):
    rows = [(k, p, m) for k in TOP_K for p in TOP_P for m in MIN_P]
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(len(rows), vocabulary, generator=generator) * spread
    temperatures = torch.tensor([0.2, 0.8, 1.0, 2.5])[torch.randint(0, 4, (len(rows),), generator=generator)]
    top_ks, top_ps, min_ps = zip(*rows, strict=True)
    given = params(len(rows), temperatures.tolist(), top_ps, top_ks, min_ps)
    assert_equal_to_sglang(sglang_sampler, logits, given)


@pytest.mark.parametrize("given", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.7}, {}])
def test_one_filter_at_a_time(sglang_sampler, given: dict[str, float]):
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(3)) * 2
    assert_equal_to_sglang(sglang_sampler, logits, params(50, temperature=0.9, **given))


@pytest.mark.parametrize("given", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 1.0}, {"top_k": 5, "top_p": 0.5}])
def test_ties_are_broken_as_in_sglang(sglang_sampler, given: dict[str, float]):
    """Few distinct values, so that nearly every boundary falls between equal probabilities."""
    logits = torch.randint(0, 3, (100, 64), generator=torch.Generator().manual_seed(4)).float()
    assert_equal_to_sglang(sglang_sampler, logits, params(100, **given))


def test_top_k_keeps_exactly_k_of_equal_tokens():
    probs = filtered_probs(torch.zeros(1, 16), params(1, top_k=5))
    assert (probs > 0).sum() == 5
    assert probs.max() == pytest.approx(0.2)


def test_top_k_1_is_one_hot_at_the_argmax():
    logits = torch.randn(30, 100, generator=torch.Generator().manual_seed(5))
    probs = filtered_probs(logits, params(30, top_k=1))
    assert torch.equal(probs, torch.nn.functional.one_hot(logits.argmax(dim=-1), 100).float())


def test_top_k_all_keeps_every_token():
    assert kept(of_probs(0.5, 0.25, 0.25), top_k=TOP_K_ALL, top_p=0.9999) == [0.5, 0.25, 0.25]


def test_top_p_keeps_a_token_while_the_mass_before_it_does_not_exceed_p():
    assert kept(of_probs(0.5, 0.25, 0.125, 0.125), top_p=0.5) == [0.6667, 0.3333, 0, 0]
    assert kept(of_probs(0.5, 0.25, 0.125, 0.125), top_p=0.4999) == [1, 0, 0, 0]
    assert kept(of_probs(0.5, 0.25, 0.125, 0.125), top_p=0.75) == [0.5714, 0.2857, 0.1429, 0]


def test_top_p_looks_at_the_mass_before_top_k_cut_it():
    """Renormalized after top-k, the mass before the second token would be .667 and not .5."""
    assert kept(of_probs(0.125, 0.5, 0.25, 0.125), top_k=2, top_p=0.6) == [0, 0.6667, 0.3333, 0]


def test_min_p_is_relative_to_the_largest_and_keeps_equality():
    row = of_probs(0.125, 0.5, 0.25, 0.125)
    assert kept(row, min_p=0.25) == [0.125, 0.5, 0.25, 0.125]
    assert kept(row, min_p=0.251) == [0, 0.6667, 0.3333, 0]
    assert kept(row, min_p=1.0) == [0, 1, 0, 0]


def test_temperature_comes_before_the_filters():
    """At T=.5 the row is .75, .1875, .0469, .0117 (times 1.0039): the second token is below min_p = .3."""
    row = of_probs(0.5, 0.25, 0.125, 0.0625)
    assert kept(row, min_p=0.3) == [0.6667, 0.3333, 0, 0]
    assert kept(row, temperature=0.5, min_p=0.3) == [1, 0, 0, 0]


def test_all_filters_together():
    row = of_probs(0.25, 0.25, 0.25, 0.125, 0.0625, 0.0625)
    assert (filtered_probs(row, params(1, top_k=4, top_p=0.5, min_p=0.5)) > 0).sum() == 3
    assert (filtered_probs(row, params(1, top_k=2, top_p=0.5, min_p=0.5)) > 0).sum() == 2
    assert (filtered_probs(row, params(1, top_k=4, top_p=0.9, min_p=0.5)) > 0).sum() == 4
    assert (filtered_probs(row, params(1, top_k=6, top_p=0.9, min_p=0.6)) > 0).sum() == 3


def test_masked_tokens_stay_excluded():
    logits = torch.tensor([[1.0, -torch.inf, 2.0, -torch.inf]])
    for given in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.001}):
        probs = filtered_probs(logits, params(1, **given))
        assert (probs[0, [1, 3]] == 0).all() and (probs[0, [0, 2]] > 0).all(), given


def test_rows_do_not_influence_each_other():
    """A batch of mixed rows gives each row what it gets alone, with flags that its neighbours switched on."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(6))
    mixed = params(4, [1.0, 0.7, 1.0, 1.3], [1.0, 0.6, 1.0, 1.0], [TOP_K_ALL, TOP_K_ALL, 7, TOP_K_ALL], [0, 0, 0, 0.2])
    alone = torch.cat([filtered_probs(logits[i : i + 1], mixed.rows(torch.tensor([i]))) for i in range(4)])
    assert torch.equal(filtered_probs(logits, mixed), alone)
    torch.testing.assert_close(filtered_probs(logits, mixed)[0], torch.softmax(logits[0], dim=-1))


def test_repeat_lays_rows_out_as_the_verify_pass_does():
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(7))
    given = params(2, [0.5, 1.5], [0.8, 1.0], [TOP_K_ALL, 5])
    flat = filtered_probs(logits.reshape(6, 40), given.repeat(3)).view(2, 3, 40)
    for position in range(3):
        assert torch.equal(flat[:, position], filtered_probs(logits[:, position], given))


def test_half_precision_logits_are_computed_in_fp32():
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(8)).bfloat16()
    given = params(3, temperature=0.7, top_p=0.9)
    assert torch.equal(filtered_probs(logits, given), filtered_probs(logits.float(), given))
