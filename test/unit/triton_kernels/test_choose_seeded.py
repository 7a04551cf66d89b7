"""choose_seeded: the token of SGLang's own seeded sampler, from the reference in fp64 and from Triton's kernel.

Hypothesis: the same noise bit for bit, so that only fp32's rounding of SGLang's log-probabilities can choose otherwise.
Method: random rows, seeds of 64 bits and positions against SGLang's function, run as it is on a CPU; a row that differs
must have two scores that are equal to 1e-5.
"""

from __future__ import annotations

from math import inf, nan
from zlib import crc32

import pytest
import torch

from sglang_er.compat import torchvision_shim
from sglang_er.kernels import choose_seeded
from sglang_er.kernels.reference.murmur_hash import murmur_hash32

VOCABULARY = 151_936
IMPLEMENTATIONS = ("reference", "triton")
SEEDS = [0, 1, 42, 2**31, 2**40 + 5, 2**62 + 7, 2**63 - 1, -1]


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="module")
def sglang_choice():
    """(logits, temperatures, seeds, positions) -> tokens, by SGLang's function with nothing compiled."""
    torchvision_shim.install()
    from sglang.srt.layers import sampler

    def choose(logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor):
        probs = torch.softmax(logits.float() / temperatures[:, None], dim=-1)
        return sampler.sampling_from_probs_torch(probs, sampling_seed=seeds, positions=positions).to(torch.int64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "murmur_hash32", murmur_hash32)
        with torch.compiler.set_stance("force_eager"):
            yield choose


def scores(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    uniform = murmur_hash32(seeds, positions, torch.arange(logits.shape[1])).double() / 0xFFFFFFFF
    return logits.double() / temperatures.double()[:, None] - (-uniform.log()).log()


def random_rows(rows: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    logits = 2 * torch.randn(rows, size, generator=generator)
    temperatures = torch.rand(rows, generator=generator) + 0.3
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return logits, temperatures, seeds, torch.randint(0, 2**31, (rows,), generator=generator)


@pytest.mark.parametrize(
    ("implementation", "rows", "size"),
    [
        *(("reference", 2000, size) for size in (1, 2, 33, 1500)),
        *(("triton", rows, size) for rows, size in ((8, 1), (30, 2), (150, 33), (40, 1023), (40, 1025), (30, 5000))),
    ],
)
def test_sglangs_choice(generator: torch.Generator, sglang_choice, implementation: str, rows: int, size: int):
    arguments = random_rows(rows, size, generator)
    chosen, expected = choose_seeded(*arguments, implementation=implementation), sglang_choice(*arguments)
    assert chosen.dtype == torch.int64
    differing = (chosen != expected).nonzero().flatten()
    assert len(differing) <= rows // 500
    exact = scores(*(argument[differing] for argument in arguments))
    found, wanted = (exact.gather(1, index[differing][:, None]) for index in (chosen, expected))
    assert (found >= wanted).all() and (found - wanted < 1e-5).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_real_vocabulary_and_every_kind_of_seed(generator: torch.Generator, sglang_choice, implementation: str):
    logits = 3 * torch.randn(1, VOCABULARY, generator=generator)
    for seed in SEEDS if implementation == "reference" else SEEDS[4:5]:
        arguments = (logits, torch.ones(1), torch.tensor([seed]), torch.tensor([40_000]))
        assert torch.equal(choose_seeded(*arguments, implementation=implementation), sglang_choice(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(generator: torch.Generator, dtype: torch.dtype):
    logits, *rest = random_rows(20, 1300, generator)
    expected = choose_seeded(logits.to(dtype).double(), *rest, implementation="reference")
    for implementation in IMPLEMENTATIONS:
        assert torch.equal(choose_seeded(logits.to(dtype), *rest, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_tokens_are_never_chosen(implementation: str):
    logits = torch.full((12, 2100), -inf)
    places = torch.arange(12) * 190
    logits[torch.arange(12), places] = -5.0
    rest = torch.ones(12), torch.arange(12) * 2**33, torch.arange(12)
    assert torch.equal(choose_seeded(logits, *rest, implementation=implementation), places)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_broken_row_gives_an_index_in_range(implementation: str):
    """Outside the contract, but it is used as one."""
    logits = torch.zeros(3, 1200)
    logits[0, 7], logits[1], logits[2] = nan, -inf, inf
    tokens = choose_seeded(logits, torch.ones(3), torch.arange(3), torch.arange(3), implementation=implementation)
    assert ((tokens >= 0) & (tokens < 1200)).all()


def test_a_strided_view_and_a_row_alone(generator: torch.Generator):
    logits, *rest = random_rows(5, 1300, generator)
    wide = torch.full((5, 1400), inf)
    wide[:, 30:1330] = logits
    whole = choose_seeded(wide[:, 30:1330], *rest, implementation="triton")
    assert torch.equal(whole, choose_seeded(logits, *rest, implementation="triton"))
    for row in range(5):
        one = slice(row, row + 1)
        alone = choose_seeded(logits[one], *(column[one] for column in rest), implementation="triton")
        assert alone == whole[row]


def test_wrong_arguments_are_refused():
    logits, ones, ids = torch.zeros(2, 5), torch.ones(2), torch.zeros(2, dtype=torch.int64)
    for name, arguments in (
        ("temperatures", (logits, ones.double(), ids, ids)),
        ("seeds", (logits, ones, ids.int(), ids)),
        ("positions", (logits, ones, ids, torch.zeros(3, dtype=torch.int64))),
        ("nothing to choose", (logits[:, :0], ones, ids, ids)),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            choose_seeded(*arguments)
