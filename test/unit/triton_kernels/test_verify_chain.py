"""verify_chain: the reference against the composed rule and the target's distribution, Triton against the reference."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch
from support.uniformity import chi2_p_value

from sglang_er.kernels.chain_ops import verify_chain
from sglang_er.kernels.reference import verify_chain as reference
from sglang_er.kernels.reference.sample_rows import sample_rows
from sglang_er.kernels.triton import verify_chain as kernel
from sglang_er.sampling import chain

LAST_COIN = 1 - 2.0**-53
LEVEL = 1e-4
POISON = -0x55555556

Chain = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(request.node.nodeid.encode()))


def drawn_from(q: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One draft per distribution, q [B, gamma, V] -> int64 [B, gamma]."""
    flat = q.flatten(0, 1)
    drafts = torch.empty(len(flat), dtype=torch.int64)
    sample_rows(flat, None, None, torch.rand(len(flat), dtype=torch.float64, generator=generator), drafts)
    return drafts.view(q.shape[:2])


def random_chain(rows: int, gamma: int, size: int, generator: torch.Generator, noise: float = 0.7) -> Chain:
    """p, a draft q near it, drafts from q, coins."""
    logits = 2 * torch.randn(rows, gamma + 1, size, generator=generator)
    p = torch.softmax(logits, dim=-1)
    q = torch.softmax(logits[:, :gamma] + noise * torch.randn(rows, gamma, size, generator=generator), dim=-1)
    coins = torch.rand(rows, gamma + 1, dtype=torch.float64, generator=generator)
    return p, q, drawn_from(q, generator), coins[:, :gamma].contiguous(), coins[:, gamma].contiguous()


def triton_verify(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, gamma = arguments[2].shape
    tokens = torch.full((rows, gamma + 1), POISON, dtype=torch.int64)
    accept_lens = torch.full((rows,), POISON, dtype=torch.int32)
    kernel.verify_chain(*arguments, tokens, accept_lens)
    return tokens, accept_lens


def reference_verify(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return verify_chain(*arguments, implementation="reference")


def assert_same(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, accept_lens = triton_verify(*arguments)
    expected_tokens, expected_lens = reference_verify(*arguments)
    assert torch.equal(accept_lens, expected_lens)
    assert torch.equal(tokens, expected_tokens)
    return tokens, accept_lens


def test_the_op_is_the_composed_rule(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    """Given its coins, sampling.chain commits the same tokens, padding too."""
    p, q, drafts, accept_coins, resample_coins = random_chain(200, 4, 50, generator)
    coins = iter((accept_coins, resample_coins))
    monkeypatch.setattr(chain.torch, "rand", lambda *_, **__: next(coins))
    monkeypatch.setenv("SGLANG_ER_KERNELS", "reference")
    expected = chain.verify_chain(p, q, drafts)
    tokens, accept_lens = verify_chain(p, q, drafts, accept_coins, resample_coins)
    assert torch.equal(tokens, expected.tokens) and tokens.dtype == torch.int64
    assert torch.equal(accept_lens, expected.accept_lens) and accept_lens.dtype == torch.int32


def test_first_tokens_are_the_targets(generator: torch.Generator):
    """20,000 chains: committed tokens follow p at every offset, and the test would notice if they followed q."""
    size, gamma, draws = 7, 3, 20_000
    p = torch.softmax(torch.randn(gamma + 1, size, generator=generator), dim=-1)
    q = torch.softmax(torch.randn(gamma, size, generator=generator), dim=-1)
    tokens, lengths = [], []
    for _ in range(0, draws, 5_000):
        p_rows, q_rows = p.expand(5_000, -1, -1), q.expand(5_000, -1, -1)
        coins = torch.rand(5_000, gamma + 1, dtype=torch.float64, generator=generator)
        drafts = drawn_from(q_rows, generator)
        part = reference_verify(p_rows, q_rows, drafts, coins[:, :gamma], coins[:, gamma].contiguous())
        tokens.append(part[0])
        lengths.append(part[1])
    committed, accept_lens = torch.cat(tokens), torch.cat(lengths)
    for offset in range(gamma + 1):
        reached = committed[accept_lens > offset, offset]
        counts = torch.bincount(reached, minlength=size)
        exact = p[offset].double() / p[offset].double().sum()
        assert chi2_p_value(counts, exact * len(reached)) > LEVEL, offset
        if offset == 0:
            draft = q[0].double() / q[0].double().sum()
            assert chi2_p_value(counts, draft * len(reached)) < LEVEL


def test_triton_on_hundreds_of_small_chains(generator: torch.Generator):
    _, accept_lens = assert_same(*random_chain(200, 3, 7, generator))
    assert torch.bincount(accept_lens, minlength=5)[1:].min() >= 5, "every length must occur"


@pytest.mark.parametrize("gamma", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 1000, 1025, 2049])
def test_triton_is_the_reference(generator: torch.Generator, gamma: int, size: int):
    assert_same(*random_chain(6, gamma, size, generator))


def test_a_real_vocabulary(generator: torch.Generator):
    assert_same(*random_chain(2, 2, 151_936, generator, noise=0.2))


def test_extreme_coins_and_zeros(generator: torch.Generator):
    """Zeros in p and q; drafts that p excludes; coins at both ends. No committed token lacks weight."""
    for seed in range(4):
        generator.manual_seed(seed)
        p, q, _, accept_coins, resample_coins = random_chain(16, 3, 1100, generator)
        p *= torch.rand(p.shape, generator=generator) < 0.1
        q *= torch.rand(q.shape, generator=generator) < 0.1
        p[..., 5] += 1e-30
        q[..., 7] += 1e-30
        drafts = drawn_from(q, generator)
        # Shared support, so that some drafts are kept.
        p[:, :3].scatter_add_(2, drafts[..., None], torch.full((16, 3, 1), 0.5))
        p[::4, 0].scatter_(1, drafts[::4, :1], 0.0)
        resample_coins[::3], resample_coins[1::3] = 0.0, LAST_COIN
        accept_coins[::5], accept_coins[1::5] = 0.0, LAST_COIN
        arguments = (p, q, drafts, accept_coins, resample_coins)
        tokens, lens = assert_same(*arguments)
        rows, last = torch.arange(16), lens.long() - 1
        assert (p[rows, last, tokens[rows, last]] > 0).all()
        assert (lens[::4] == 1).all(), "a draft that the target excludes is never kept"


def test_nothing_left_of_the_residual_draws_from_p(generator: torch.Generator):
    """q above p everywhere: a rejection leaves nothing, and p itself is drawn from."""
    p, q, drafts, accept_coins, resample_coins = random_chain(8, 2, 1500, generator)
    q = 1.5 * p[:, :2]
    accept_coins[:, 0], accept_coins[:, 1] = 0.1, LAST_COIN  # the first kept, the second rejected
    tokens, accept_lens = assert_same(p, q, drafts, accept_coins, resample_coins)
    assert (accept_lens == 2).all()
    drawn = torch.empty(8, dtype=torch.int64)
    sample_rows(p[:, 1], None, None, resample_coins, drawn)
    assert torch.equal(tokens[:, 1], drawn)


def test_strided_views(generator: torch.Generator):
    """Chains in larger buffers, transposed; what lies beside is NaN. Outputs with rows further apart are kept to."""
    p, q, drafts, accept_coins, resample_coins = random_chain(5, 3, 1100, generator)
    wide = torch.full((4, 5, 1140), float("nan"))
    wide[:, :, 17:1117] = p.transpose(0, 1)
    behind = torch.full((3, 5, 1140), float("nan"))
    behind[:, :, 5:1105] = q.transpose(0, 1)
    views = [wide[:, :, 17:1117].transpose(0, 1), behind[:, :, 5:1105].transpose(0, 1)]
    for narrow in (drafts, accept_coins):
        broad = torch.full((5, 6), -1, dtype=narrow.dtype)
        broad[:, 2:5] = narrow
        views.append(broad[:, 2:5])
    expected = reference_verify(p, q, drafts, accept_coins, resample_coins)
    broad, lens = torch.full((5, 9), POISON, dtype=torch.int64), torch.full((5,), POISON, dtype=torch.int32)
    kernel.verify_chain(views[0], views[1], views[2], views[3], resample_coins, broad[:, 3:7], lens)
    assert torch.equal(broad[:, 3:7], expected[0]) and torch.equal(lens, expected[1])
    assert (broad[:, :3] == POISON).all() and (broad[:, 7:] == POISON).all()


def test_a_chain_does_not_depend_on_the_others(generator: torch.Generator):
    arguments = random_chain(4, 3, 2100, generator)
    tokens, accept_lens = triton_verify(*arguments)
    for row in range(4):
        alone = triton_verify(*(argument[row : row + 1] for argument in arguments))
        assert torch.equal(alone[0][0], tokens[row]) and alone[1][0] == accept_lens[row]


def test_fp64_is_the_references(generator: torch.Generator):
    p, q, drafts, accept_coins, resample_coins = random_chain(20, 2, 30, generator)
    single = reference_verify(p, q, drafts, accept_coins, resample_coins)
    double = reference_verify(p.double(), q.double(), drafts, accept_coins, resample_coins)
    assert all(torch.equal(a, b) for a, b in zip(single, double))


def test_no_chains():
    tokens, accept_lens = verify_chain(
        torch.empty(0, 3, 5),
        torch.empty(0, 2, 5),
        torch.empty(0, 2, dtype=torch.int64),
        torch.empty(0, 2, dtype=torch.float64),
        torch.empty(0, dtype=torch.float64),
    )
    assert tokens.shape == (0, 3) and accept_lens.shape == (0,)


def test_bad_arguments_are_one_line(generator: torch.Generator):
    p, q, drafts, accept_coins, resample_coins = random_chain(2, 3, 5, generator)
    good = {"p": p, "q": q, "drafts": drafts, "accept_coins": accept_coins, "resample_coins": resample_coins}
    for change, message in (
        ({"p": p[:, :3]}, "p has shape"),
        ({"p": p[0]}, "p has shape"),
        ({"q": q[:, :2]}, "q has shape"),
        ({"q": q[..., :4]}, "q has shape"),
        ({"q": q.double()}, "q is"),
        ({"p": p.transpose(1, 2).contiguous().transpose(1, 2)}, "last dimension must be contiguous"),
        ({"drafts": drafts.int()}, "drafts is"),
        ({"drafts": drafts[:, :0]}, "no draft"),
        ({"drafts": drafts[0]}, "drafts has shape"),
        ({"accept_coins": accept_coins.float()}, "accept_coins is"),
        ({"accept_coins": accept_coins[:, :2]}, "accept_coins has shape"),
        ({"resample_coins": resample_coins.float()}, "resample_coins is"),
        ({"resample_coins": resample_coins[:1]}, "resample_coins has shape"),
    ):
        with pytest.raises((ValueError, TypeError), match=message) as error:
            verify_chain(**(good | change), implementation="reference")
        assert "\n" not in str(error.value)


def test_the_reference_fills_what_it_is_given(generator: torch.Generator):
    arguments = random_chain(6, 2, 9, generator)
    tokens, lens = torch.full((6, 3), POISON, dtype=torch.int64), torch.full((6,), POISON, dtype=torch.int32)
    reference.verify_chain(*arguments, tokens, lens)
    assert ((tokens >= 0) & (tokens < 9)).all() and ((lens >= 1) & (lens <= 3)).all()
