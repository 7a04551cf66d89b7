"""Chain rejection sampling alone, a million draws: committed tokens are the target's, whatever the draft is.

Hypothesis: at every offset of the chain, given the committed tokens before it, the token is drawn from p.
Method: chi-square of counts against exact probabilities, all groups of a test judged at a family-wise 1e-4, fixed
seeds; the same judgement must reject three broken verifiers and accept a draft that is biased but truthfully reported.
If broken: the offset with the wrong formula is named in the rejected p-values.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.mutants import BROKEN, draft_with, verify_with
from support.uniformity import Family, binomial_p_value, chi2_p_value, poisson_excess_p_value

from sglang_er.sampling import chain
from sglang_er.sampling.chain import sample_rows, verify_chain, verify_choices

DRAWS = 1_000_000
CELLS = 250_000  # probabilities held at once: few enough for the cache


def normalized(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def dirichlet(*shape: int, concentration: float, seed: int) -> torch.Tensor:
    """Random distributions over the last dimension, fp32; a low concentration leaves few likely tokens."""
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.distributions.Gamma(concentration, 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(0, 2**31, (1,), generator=generator)))
        return normalized(gamma.sample(shape).clamp_(min=1e-30)).float()


def chunks(draws: int, cells_per_draw: int) -> Iterator[int]:
    size = max(1, CELLS // cells_per_draw)
    for start in range(0, draws, size):
        yield min(size, draws - start)


def run_independent(
    p: torch.Tensor, q: torch.Tensor, draws: int, seed: int, mutant: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chains under p [gamma + 1, V], q [gamma, V] that do not depend on earlier tokens -> (tokens, accept_lens)."""
    generator = torch.Generator().manual_seed(seed)
    gamma, vocabulary = q.shape
    tokens, lengths = [], []
    for n in chunks(draws, (gamma + 1) * vocabulary):
        pairs = [draft_with(mutant, row.expand(n, -1), generator) for row in q]
        drafts, reported = (torch.stack(parts, dim=1) for parts in zip(*pairs, strict=True))
        result = verify_with(mutant, p.expand(n, -1, -1), reported, drafts, generator)
        assert_well_formed(*result, drafts, p)
        tokens.append(result.tokens)
        lengths.append(result.accept_lens)
    return torch.cat(tokens), torch.cat(lengths)


def assert_well_formed(tokens: torch.Tensor, accept_lens: torch.Tensor, drafts: torch.Tensor, p: torch.Tensor) -> None:
    """Shapes, types, ranges; what precedes the last committed token is the drafts."""
    batch, gamma = drafts.shape
    assert tokens.shape == (batch, gamma + 1) and tokens.dtype == torch.int64
    assert accept_lens.shape == (batch,) and accept_lens.dtype == torch.int32
    assert accept_lens.min() >= 1 and accept_lens.max() <= gamma + 1
    assert tokens.min() >= 0 and tokens.max() < p.shape[-1], "padding must be token ids too"
    kept = torch.arange(gamma)[None, :] < accept_lens[:, None] - 1
    assert torch.equal(tokens[:, :gamma][kept], drafts[kept])


def judge(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> Family:
    """Tokens at every offset reached against p; acceptance at every offset against sum min(p, q)."""
    family = Family()
    p, q = normalized(p.double()), normalized(q.double())
    gamma, vocabulary = q.shape
    for offset in range(gamma + 1):
        reached = tokens[lengths > offset, offset]
        if not len(reached):
            continue
        counts = torch.bincount(reached, minlength=vocabulary)
        assert not counts[p[offset] == 0].any(), f"offset {offset}: a token of probability 0 was committed"
        family.add(f"tokens at offset {offset}", chi2_p_value(counts, p[offset] * len(reached)))
        if offset < gamma:
            accepted = int((lengths > offset + 1).sum())
            alpha = float(torch.minimum(p[offset], q[offset]).sum())
            family.add(f"acceptance at offset {offset}", binomial_p_value(accepted, len(reached), alpha))
    return family


def one_hot(index: int, vocabulary: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(index), vocabulary).float()


def case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(p [gamma + 1, V], q [gamma, V])."""
    p, q = dirichlet(4, 24, concentration=1.0, seed=1), dirichlet(3, 24, concentration=1.0, seed=2)
    if name == "close":
        return p, normalized(p[:3] * (1 + 0.3 * q / q.max()))
    if name == "equal":
        return p, p[:3].clone()
    if name == "disjoint":
        left = torch.arange(24) < 12
        return normalized(p * left), normalized(q * ~left)
    if name == "overlapping supports":
        return normalized(p * (torch.arange(24) < 16)), normalized(q * (torch.arange(24) >= 8))
    if name == "one-hot target":
        return torch.stack([one_hot(i, 24) for i in (3, 0, 23, 7)]), q
    if name == "one-hot draft":
        return p, torch.stack([one_hot(i, 24) for i in (3, 0, 23)])
    if name == "both one-hot":
        return torch.stack([one_hot(i, 24) for i in (3, 0, 23, 7)]), torch.stack([one_hot(i, 24) for i in (3, 0, 5)])
    if name == "peaked":
        return dirichlet(4, 24, concentration=0.1, seed=3), dirichlet(3, 24, concentration=0.1, seed=4)
    if name == "one draft, two tokens":
        return torch.tensor([[0.7, 0.3], [0.2, 0.8]]), torch.tensor([[0.4, 0.6]])
    if name == "seven drafts":
        p = dirichlet(8, 6, concentration=2.0, seed=5)
        return p, normalized(p[:7] + 0.05)
    raise KeyError(name)


CASES = ["close", "equal", "disjoint", "overlapping supports", "one-hot target", "one-hot draft", "both one-hot"]
CASES += ["peaked", "one draft, two tokens", "seven drafts"]


@pytest.mark.parametrize("name", CASES)
def test_committed_tokens_are_the_targets_at_every_offset(name: str):
    p, q = case(name)
    family = judge(p, q, *run_independent(p, q, DRAWS, seed=10))
    print(family.smallest())
    assert not family.rejected()


def test_a_vocabulary_of_thousands():
    """Peaked distributions over 4000 tokens: most have probabilities far below one draw's share."""
    p, q = dirichlet(2, 4000, concentration=0.05, seed=6), dirichlet(1, 4000, concentration=0.05, seed=7)
    q = normalized(0.7 * p[:1] + 0.3 * q)
    family = judge(p, q, *run_independent(p, q, 50_000, seed=11))
    print(family.smallest())
    assert not family.rejected()


def test_conditional_on_the_token_before():
    """p and q depend on the token before: pairs of neighbours follow p, so each row of p goes with its own draft."""
    vocabulary, gamma = 8, 3
    p_next, q_next = (dirichlet(vocabulary, vocabulary, concentration=0.7, seed=seed) for seed in (8, 9))
    q_next = normalized(p_next + 0.4 * q_next)
    generator = torch.Generator().manual_seed(12)
    context = torch.randint(0, vocabulary, (DRAWS,), generator=generator)
    drafted, q_rows = [], []
    previous = context
    for _ in range(gamma):
        q_rows.append(q_next[previous])
        previous = sample_rows(q_rows[-1], generator)
        drafted.append(previous)
    drafts = torch.stack(drafted, dim=1)
    p = p_next[torch.cat([context[:, None], drafts], dim=1)]
    tokens, lengths = verify_chain(p, torch.stack(q_rows, dim=1), drafts, generator)

    family = Family()
    history = torch.cat([context[:, None], tokens], dim=1)
    for offset in range(gamma + 1):
        before, after = history[lengths > offset, offset : offset + 2].unbind(dim=1)
        for token in range(vocabulary):
            counts = torch.bincount(after[before == token], minlength=vocabulary)
            exact = normalized(p_next[token].double())
            family.add(f"offset {offset} after {token}", chi2_p_value(counts, exact * counts.sum()))
    print(family.smallest())
    assert not family.rejected()


@pytest.mark.parametrize("tail_in_draft", [0.0, 0.5])
def test_tiny_tails_are_not_drawn_too_often(tail_in_draft: float):
    """999 tokens share a mass of 1e-6: a sampler that adds in fp32, or bounds its residual from below, over-draws them.

    The draft proposes them half the time, or never; the target must keep them at one in a million.
    """
    vocabulary, mass, draws = 1000, 1e-9, 100_000
    tail = torch.full((vocabulary,), mass)
    tail[0] = 1 - mass * (vocabulary - 1)
    p = tail.repeat(2, 1)
    q = torch.full((vocabulary,), tail_in_draft / (vocabulary - 1))
    q[0] = 1 - tail_in_draft
    tokens, lengths = run_independent(p, q[None], draws, seed=13)
    committed = torch.cat([tokens[:, 0], tokens[lengths == 2, 1]])
    count = int((committed > 0).sum())
    expected = mass * (vocabulary - 1) * len(committed)
    assert poisson_excess_p_value(count, expected) > 1e-4, (count, expected)


def test_a_long_tail_keeps_its_share(monkeypatch: pytest.MonkeyPatch):
    """100,000 tokens of 1e-8 each behind one of .999, finer than fp32 can place them. Coins are set, not random."""
    weights = torch.full((1, 100_001), 1e-8)
    weights[0, 0] = 0.999
    cdf = weights.double().cumsum(dim=-1)[0]
    for coin in torch.linspace(0.9985, 0.9999, 29, dtype=torch.float64).tolist():
        monkeypatch.setattr(chain.torch, "rand", lambda shape, c=coin, **_: torch.full(tuple(shape), c).double())
        token = int(sample_rows(weights))
        expected = int((cdf <= coin * float(cdf[-1])).sum())
        assert abs(token - expected) <= 3, (coin, token, expected)


def test_rounding_noise_between_equal_distributions_is_not_amplified():
    """q is p computed with other rounding: acceptance is 1 up to 1e-5 and tokens without mass stay uncommitted."""
    logits = torch.randn(2, 512, generator=torch.Generator().manual_seed(14)) * 3
    logits[:, 100:] = -torch.inf
    p, q = torch.softmax(logits, dim=-1), torch.softmax(logits.double() + 1e-7, dim=-1).float()[:1]
    tokens, lengths = run_independent(p, q, 200_000, seed=15)
    assert (lengths == 1).sum() <= 20
    family = judge(p, q, tokens, lengths)
    assert not family.rejected()


@pytest.mark.parametrize("coin", [0.0, 0.5, 1 - 2.0**-53])
def test_no_coin_draws_a_token_without_weight(monkeypatch: pytest.MonkeyPatch, coin: float):
    """The extreme values of the generator on weights with zeros at both ends and in between, at several scales."""
    monkeypatch.setattr(chain.torch, "rand", lambda shape, **kw: torch.full(tuple(shape), coin, dtype=kw["dtype"]))
    pattern = torch.tensor([0, 0, 0.1, 0, 0.3, 0.7, 0, 0, 0])
    weights = torch.stack([pattern * scale for scale in (1e-30, 1e-7, 1.0, 3.0, 1e30)] + [one_hot(0, 9), one_hot(8, 9)])
    drawn = sample_rows(weights)
    assert (weights.gather(1, drawn[:, None]) > 0).all()
    if coin == 0.0:
        assert drawn.tolist() == [2] * 5 + [0, 8]
    if coin > 0.9:
        assert drawn.tolist() == [5] * 5 + [0, 8]


def test_the_smallest_coin_does_not_accept_a_draft_that_the_target_excludes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chain.torch, "rand", lambda shape, **kw: torch.zeros(tuple(shape), dtype=kw["dtype"]))
    p, q = torch.tensor([[[0.0, 0.0, 0.5, 0.5]] * 2]), torch.tensor([[[0.6, 0.1, 0.3, 0.0]]])
    tokens, lengths = verify_chain(p, q, torch.tensor([[0]]))
    assert lengths.tolist() == [1] and tokens[0, 0] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_rows_follows_weights_that_are_not_normalized(dtype: torch.dtype):
    weights = dirichlet(3, 50, concentration=0.3, seed=16).to(dtype) * torch.tensor([[1e-6], [1.0], [1e6]], dtype=dtype)
    family = Family()
    for row, values in enumerate(weights):
        drawn = sample_rows(values.expand(DRAWS // 10, -1), torch.Generator().manual_seed(row))
        counts = torch.bincount(drawn, minlength=50)
        family.add(f"row {row}", chi2_p_value(counts, normalized(values.double()) * len(drawn)))
    assert not family.rejected()


def test_verify_choices_keeps_the_drafts_that_are_the_targets_choice():
    choices = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    drafts = torch.tensor([[5, 6, 7], [5, 6, 0], [0, 6, 7], [5, 0, 7]])
    tokens, lengths = verify_choices(choices, drafts)
    assert torch.equal(tokens, choices)
    assert lengths.tolist() == [4, 3, 1, 2] and lengths.dtype == torch.int32


@pytest.mark.parametrize("name", ["close", "peaked", "seven drafts"])
@pytest.mark.parametrize("mutant", BROKEN)
def test_a_broken_verifier_is_seen(mutant: str, name: str):
    p, q = case(name)
    family = judge(p, q, *run_independent(p, q, DRAWS // 10, seed=17, mutant=mutant))
    assert any(group.startswith("tokens") for group in family.rejected()), family.smallest()


@pytest.mark.parametrize("name", CASES)
def test_a_biased_draft_is_corrected(name: str):
    p, q = case(name)
    tokens, lengths = run_independent(p, q, DRAWS // 10, seed=18, mutant="biased_draft")
    powered = normalized(q.double() ** 1.5)
    family = judge(p, powered, tokens, lengths)
    assert not family.rejected()
