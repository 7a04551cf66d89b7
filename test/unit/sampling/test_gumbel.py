"""Seeded sampling: the hash is SGLang's bit for bit, so a seeded choice is the one plain decode makes.

Hypothesis: murmur_hash32 equals SGLang's Triton kernel and the published algorithm; with it, SGLang's seeded sampler
makes the same choices as an independent Gumbel-max computation; draft and verify agree on them.
If broken: one wrong bit of the hash changes about one choice in a few; the goldens name the input.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.uniformity import Family, chi2_p_value

from sglang_er.compat import torchvision_shim
from sglang_er.kernels.reference.murmur_hash import murmur_hash32

MASK = 0xFFFFFFFF
GOLDEN = {
    (0, 0, 0): 2167721464,
    (0, 0, 1): 10027521,
    (1, 1, 0): 690670310,
    (2**40 + 5, 5, 2): 960815519,
    (2**62 + 7, 511, 1): 606505381,
}


def murmur3(blocks: list[int]) -> int:
    """MurmurHash3 x86_32 with seed 0 of 4-byte blocks, in plain integers, as its author describes it."""

    def rotate(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (32 - bits))) & MASK

    h = 0
    for block in blocks:
        h ^= rotate(block * 0xCC9E2D51 & MASK, 15) * 0x1B873593 & MASK
        h = (rotate(h, 13) * 5 + 0xE6546B64) & MASK
    h ^= 4 * len(blocks)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK
    return h ^ (h >> 16)


def expected_hash(seed: int, position: int, column: int) -> int:
    return murmur3([seed & MASK, (seed >> 32) & MASK, position & MASK, column & MASK])


@pytest.fixture(scope="module")
def seeded():
    """SGLang's sampler and ours, with the hash replaced as the CPU platform does it, and nothing compiled."""
    torchvision_shim.install()
    from sglang.srt.layers import sampler as sglang_sampler

    from sglang_er.engine import sampler as our_sampler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang_sampler, "murmur_hash32", murmur_hash32)
        with torch.compiler.set_stance("force_eager"):
            yield SimpleNamespace(sglang=sglang_sampler, ours=our_sampler)


def test_the_integer_version_gives_the_published_value():
    assert murmur3([int.from_bytes(b"test", "little")]) == 0xBA6BD213


def test_golden_values():
    for (seed, position, column), expected in GOLDEN.items():
        got = murmur_hash32(torch.tensor([seed]), torch.tensor([position]), torch.tensor([column]))
        assert got.tolist() == [[expected]], (seed, position, column)


def test_random_inputs_match_the_integer_version():
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(0, 2**63 - 1, (8,), generator=generator)
    positions = torch.randint(0, 2**31, (8,), generator=generator)
    columns = torch.randint(0, 200_000, (50,), generator=generator)
    got = murmur_hash32(seeds, positions, columns)
    for i, row in enumerate(got.tolist()):
        assert row == [expected_hash(int(seeds[i]), int(positions[i]), int(c)) for c in columns]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint64])
def test_integer_types_of_seed_and_position_do_not_matter(dtype: torch.dtype):
    seeds, positions, columns = torch.tensor([0, 7, 2**31 - 1]), torch.tensor([0, 9, 500]), torch.arange(20)
    expected = murmur_hash32(seeds, positions, columns)
    assert torch.equal(murmur_hash32(seeds.to(dtype), positions.to(torch.int32), columns.to(torch.int32)), expected)


def test_seeds_above_the_signed_range():
    seeds = torch.tensor([2**63 + 11, 2**64 - 1], dtype=torch.uint64)
    got = murmur_hash32(seeds, torch.tensor([3, 4]), torch.arange(2)).tolist()
    assert got == [[expected_hash(2**63 + 11, 3, c) for c in (0, 1)], [expected_hash(2**64 - 1, 4, c) for c in (0, 1)]]


@pytest.mark.parametrize(
    ("seeds", "positions", "columns"), [((2,), (3,), (4,)), ((2, 1), (2, 1), (4,)), ((2,), (2,), (4, 1))]
)
def test_wrong_shapes_are_refused(seeds: tuple[int, ...], positions: tuple[int, ...], columns: tuple[int, ...]):
    with pytest.raises(ValueError):
        murmur_hash32(*(torch.zeros(shape, dtype=torch.int64) for shape in (seeds, positions, columns)))


INTERPRETED = """
import torch
from sglang_er.compat import torchvision_shim
torchvision_shim.install()
from sglang.kernels.ops.sampling import murmur_hash
from sglang_er.kernels.reference.murmur_hash import murmur_hash32

generator = torch.Generator().manual_seed(2)
seeds = torch.cat([torch.randint(0, 2**63 - 1, (5,), generator=generator), torch.tensor([0, 1, 2**32, 42])])
positions = torch.cat([torch.randint(0, 2**31, (5,), generator=generator), torch.tensor([0, 1, 511, 40000])])
columns = torch.arange(3000)
out = torch.empty(len(seeds), len(columns), dtype=torch.uint32)
murmur_hash.murmur_hash32_kernel[(len(seeds), 3)](
    seeds.to(torch.uint64), positions, columns, out, len(seeds), len(columns), BLOCK_SIZE=1024
)
assert torch.equal(out.to(torch.int64), murmur_hash32(seeds, positions, columns))
print("equal", out.numel())
"""


@pytest.mark.slow
def test_the_hash_is_that_of_sglangs_triton_kernel():
    """The kernel itself, under Triton's interpreter, which must be chosen before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal 27000" in done.stdout


def test_sglangs_seeded_choice_is_the_gumbel_maximum(seeded):
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(3)) * 2
    seeds, positions = torch.arange(40) * 2**33 + 17, torch.arange(40) * 7
    got = seeded.sglang.multinomial_with_seed(torch.log_softmax(logits.double(), dim=-1), seeds, positions)
    for row in range(40):
        noise = [expected_hash(int(seeds[row]), int(positions[row]), column) / MASK for column in range(60)]
        scores = [float(logits[row, c]) - math.log(-math.log(noise[c])) for c in range(60)]
        assert int(got[row]) == scores.index(max(scores))


def sampling_info(rows: int, **changed: object) -> SimpleNamespace:
    """The fields of SGLang's SamplingBatchInfo that the step's sampler reads."""
    fields: dict[str, object] = {
        "is_all_greedy": False,
        "temperatures": torch.full((rows, 1), 0.9),
        "top_ps": torch.ones(rows),
        "top_ks": torch.full((rows,), 1 << 30, dtype=torch.int32),
        "min_ps": torch.zeros(rows),
        "need_top_p_sampling": False,
        "need_top_k_sampling": False,
        "need_min_p_sampling": False,
        "sampling_seed": torch.arange(rows) + 1000,
    }
    return SimpleNamespace(**{**fields, **changed})


@pytest.mark.parametrize("filtered", [False, True])
def test_a_twin_that_equals_the_target_is_always_accepted(seeded, filtered: bool):
    """Draft and verify draw with the same noise at the same position; the tokens do not depend on gamma."""
    rows, gamma, vocabulary = 16, 5, 80
    info = sampling_info(rows)
    if filtered:
        info = sampling_info(rows, top_ps=torch.full((rows,), 0.8), need_top_p_sampling=True)
    logits = torch.randn(rows, gamma + 1, vocabulary, generator=torch.Generator().manual_seed(4))
    positions = torch.arange(rows)[:, None] * 3 + torch.arange(gamma + 1)[None, :]

    def run(length: int) -> torch.Tensor:
        sampler = seeded.ours.StepSampler(info, None)
        assert sampler.rule == "seeded"
        drafted = seeded.ours.DraftedChain()
        for step in range(length):
            sampler.draft(logits[:, step], positions[:, step], drafted)
        flat = logits[:, : length + 1].reshape(-1, vocabulary)
        tokens, lengths = sampler.verify(flat, positions[:, : length + 1].reshape(-1), drafted)
        assert (lengths == length + 1).all()
        return tokens

    longest = run(gamma)
    for length in range(1, gamma):
        assert torch.equal(run(length), longest[:, : length + 1])


def test_min_p_with_seeds_is_refused(seeded):
    with pytest.raises(RuntimeError, match="min_p"):
        seeded.ours.StepSampler(sampling_info(2, need_min_p_sampling=True), None)


def test_seeded_choices_follow_the_target_over_seeds_and_positions(seeded):
    """The noise is as good as random: choices over many seeds, and over many positions of one seed, follow p."""
    draws = 50_000
    probs = torch.softmax(torch.randn(12, generator=torch.Generator().manual_seed(5)), dim=-1)
    logprobs = probs.double().log().expand(draws, -1)
    seeds, zeros = torch.arange(draws), torch.zeros(draws, dtype=torch.int64)
    family = Family()
    for name, seed, position in (("seeds", seeds, zeros + 3), ("positions", zeros + 42, seeds)):
        drawn = seeded.sglang.multinomial_with_seed(logprobs, seed, position).view(-1)
        family.add(name, chi2_p_value(torch.bincount(drawn, minlength=12), probs.double() * draws))
    assert not family.rejected()
