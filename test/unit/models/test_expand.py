"""An expansion computes what the small model computes: exactly in fp32, to rounding in bf16, whatever the noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_er.models import alpha, checkpoint, evaluate, expand, guard, make, reference, streams, tiny
from sglang_er.models.expand import Expansion
from sglang_er.models.tiny import Shape

# Layers that are no multiple of 4, neurons that are no multiple of 256, odd numbers of copies, both head sizes.
SHORT_HEADS = Shape(hidden=448, layers=6, query_heads=14, kv_heads=2, head_dim=64, mlp=896, vocab=1000)
LONG_HEADS = Shape(hidden=576, layers=7, query_heads=12, kv_heads=4, head_dim=128, mlp=640, vocab=1000)
KAPPA = 3.0


@pytest.fixture(scope="module", autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor]:
    return streams.text_batch(rows=6, seed=5)


def write(model: Expansion, arch: str, directory: Path, dtype: str) -> Path:
    checkpoint.write_metadata(directory, tiny.hf_config(arch, model.shape, dtype))
    checkpoint.write_weights(directory, model.tensors(getattr(torch, dtype)))
    return directory


def log_probabilities(directory: Path, ids: torch.Tensor, dtype: str = "float32") -> torch.Tensor:
    return evaluate.load_model(directory, dtype)(ids).logits.float().log_softmax(-1)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("shape", [SHORT_HEADS, LONG_HEADS], ids=["head64", "head128"])
def test_expansion_computes_the_small_model(
    arch: str, shape: Shape, tmp_path: Path, text: tuple[torch.Tensor, torch.Tensor]
):
    ids, kept = text
    make.make_model("tiny", arch, tmp_path / "tiny", dtype="float32", progress=lambda line: None)
    small = log_probabilities(tmp_path / "tiny", ids)[kept]
    model = Expansion(arch, shape, KAPPA)

    exact = log_probabilities(write(model, arch, tmp_path / "exact", "float32"), ids)[kept]
    assert (exact[:, : small.shape[-1]] - small).abs().max() <= 1e-3
    assert exact[:, small.shape[-1] :].exp().sum(-1).max() < 1e-6

    rounded = log_probabilities(write(model, arch, tmp_path / "rounded", "bfloat16"), ids, "bfloat16")[kept]
    # bf16 arithmetic is the machine's: at least .998 on Xeons, .99796 on a Zen 4 (torch's own linear layers).
    assert alpha.overlap(small, rounded).mean() >= 0.9975
    assert rounded[:, small.shape[-1] :].exp().sum(-1).max() < 1e-6


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_unused_rows_stay_out_of_the_distribution_of_a_real_vocabulary(
    arch: str, text: tuple[torch.Tensor, torch.Tensor]
):
    size = 152064
    model = Expansion(arch, Shape(512, 4, 8, 2, 64, 512, size), 0.0)
    # The task's text, which the guard direction did not see, and tokens at random, which no task would write.
    other = torch.randint(0, tiny.TINY.vocab, (8, 64), generator=torch.Generator().manual_seed(99))
    for states in (
        streams.SmallStreams(model.small, text[0]).streams[-1][text[1]],
        streams.SmallStreams(model.small, other).streams[-1].flatten(0, 1),
    ):
        hidden = reference.rms_norm(states @ model.rotation.T, torch.ones(512), model.shape.eps)
        logits = hidden @ model.head(0, tiny.TINY.vocab + 1).bfloat16().float().T
        unused = logits[:, -1] + torch.tensor(float(size - tiny.TINY.vocab)).log() - logits[:, :-1].logsumexp(-1)
        assert unused.exp().max() < 1e-6
    # Rounding to int4 must not bring them back: their entries have one magnitude, which int4 holds.
    row = model.head(tiny.TINY.vocab, tiny.TINY.vocab + 1).bfloat16().float()
    assert (reference.fake_quantize(row) - row).abs().max() <= 0.01 * row.abs().max()


def test_the_rotation_is_orthonormal_and_spreads_the_guard_evenly():
    model = Expansion("qwen3", SHORT_HEADS, KAPPA)
    assert torch.allclose(model.rotation.T @ model.rotation, torch.eye(tiny.TINY.hidden), atol=1e-5)
    spread = (model.rotation @ guard.guard_direction("qwen3")).abs()
    assert torch.allclose(spread, torch.full_like(spread, SHORT_HEADS.hidden**-0.5), atol=1e-5)


@pytest.mark.parametrize(("count", "sources"), [(14, 4), (8, 4), (9, 4), (12, 4), (15, 4), (8960, 256), (4, 4)])
def test_the_noise_of_the_copies_cancels(count: int, sources: int):
    number, row, coefficient = expand._copies(count, sources)
    for source in range(sources):
        units = range(source, count, sources)
        assert all(int(number[unit]) == len(units) for unit in units)
        totals: dict[int, float] = {}
        for unit in units:
            totals[int(row[unit])] = totals.get(int(row[unit]), 0.0) + float(coefficient[unit])
        assert all(abs(total) < 1e-6 for total in totals.values())
        assert len(units) == 1 or all(float(coefficient[unit]) != 0 for unit in units)


def test_layers_differ_by_seed_and_repeat_for_a_seed():
    one, same, other = (Expansion("qwen3", SHORT_HEADS, KAPPA, seed).layer(2) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["mlp.down_proj.weight"], other["mlp.down_proj.weight"])


def test_more_noise_costs_acceptance(text: tuple[torch.Tensor, torch.Tensor]):
    quiet, loud = (alpha.measure(Expansion("qwen3", SHORT_HEADS, kappa), *text) for kappa in (0.0, 6.0))
    assert quiet > 0.985
    assert loud < quiet - 0.01


def test_a_shape_that_cannot_hold_the_small_model_is_refused():
    with pytest.raises(ValueError, match="too small"):
        Expansion("qwen3", Shape(192, 6, 14, 2, 64, 896, 1000), KAPPA)
    with pytest.raises(ValueError, match="too small"):
        Expansion("qwen3", Shape(512, 6, 4, 2, 64, 896, 1000), KAPPA)


@pytest.mark.slow
def test_the_smallest_public_size_computes_the_small_model(tmp_path: Path, text: tuple[torch.Tensor, torch.Tensor]):
    ids, kept = text[0][:2], text[1][:2]
    make.make_model("tiny", "qwen3", tmp_path / "tiny", dtype="float32")
    small = log_probabilities(tmp_path / "tiny", ids)[kept]
    card = make.make_model("0.5b", "qwen3", tmp_path / "big")
    assert card.alpha == pytest.approx(make.DEFAULT_ALPHA, abs=2 * alpha.TOLERANCE)
    big = log_probabilities(tmp_path / "big", ids, "bfloat16")[kept]
    # Not .998 as at the short shapes: 28 layers at this kappa cost .0010 beside the small model's own .0011.
    assert alpha.overlap(small, big).mean() >= 0.997
    assert big[:, small.shape[-1] :].exp().sum(-1).max() < 1e-6
