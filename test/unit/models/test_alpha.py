"""The measuring instruments: int4 rounding, the reference layer against transformers, the search for kappa."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_er.models import alpha, evaluate, make, reference, streams, tiny
from sglang_er.models.tiny import TINY


def test_rounding_follows_the_formula_value_by_value():
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    rounded = reference.fake_quantize(weight)
    padded = torch.nn.functional.pad(weight, (0, 84))
    for row in range(5):
        for group in range(3):
            values = padded[row, group * 128 : group * 128 + 128].tolist()
            low = float(torch.tensor(min(values)).bfloat16())
            scale = float(torch.tensor((max(values) - min(values)) / 15).bfloat16())
            for column, value in enumerate(values[: 300 - group * 128]):
                level = min(max(round((value - low) / scale), 0), 15)
                assert rounded[row, group * 128 + column] == pytest.approx(level * scale + low, abs=1e-6)


def test_rounding_keeps_what_int4_can_hold():
    weight = torch.arange(16.0).repeat(3, 8)
    assert torch.equal(reference.fake_quantize(weight), weight)
    constant = torch.full((2, 128), 0.75)
    assert torch.equal(reference.fake_quantize(constant), constant)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_the_reference_layers_are_those_of_transformers(arch: str, tmp_path: Path):
    ids, kept = streams.text_batch(rows=3)
    make.make_model("tiny", arch, tmp_path / "m", dtype="float32", progress=lambda line: None)
    with torch.inference_mode():
        theirs = evaluate.load_model(tmp_path / "m")(ids).logits.log_softmax(-1)
        ours = streams.SmallStreams({name: value.float() for name, value in tiny.load_weights(arch).items()}, ids).logp
    assert (ours - theirs)[kept].abs().max() < 1e-3


def test_a_context_of_own_keys_changes_nothing_and_another_context_reaches_only_later_positions():
    weights = {name: value.float() for name, value in tiny.load_weights("qwen3").items()}
    layer = streams.layer_of(weights, 0)
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 2, 9, TINY.hidden, generator=generator)
    plain = reference.layer_forward(layer, x, TINY)
    same = reference.layer_forward(layer, x, TINY, reference.keys_values(layer, x, TINY))
    assert torch.allclose(plain, same, atol=1e-5)
    foreign = reference.layer_forward(layer, x, TINY, reference.keys_values(layer, other, TINY))
    assert torch.allclose(plain[:, 0], foreign[:, 0], atol=1e-5)
    assert not torch.allclose(plain[:, 1], foreign[:, 1], atol=1e-2)


def test_overlap_is_one_minus_total_variation():
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert float(alpha.overlap(p, q)) == pytest.approx(0.75)
    wider = torch.tensor([[0.25, 0.5, 0.0, 0.25]]).log()
    assert float(alpha.overlap(p, wider)) == pytest.approx(0.75)


@pytest.mark.parametrize("target", [0.99, 0.95, 0.7])
def test_the_search_meets_its_target(target: float):
    kappa, reached = alpha.find_kappa(lambda kappa: 0.996 - 0.1 * kappa**3, target)
    assert abs(reached - target) <= alpha.TOLERANCE
    assert reached == pytest.approx(0.996 - 0.1 * kappa**3)


def test_a_target_above_what_no_noise_gives_is_refused():
    with pytest.raises(ValueError, match=r"cannot be reached: with next to no noise it is 0\.9"):
        alpha.find_kappa(lambda kappa: 0.99 - kappa, 0.999)


def test_a_target_that_is_never_met_is_refused():
    with pytest.raises(ValueError, match="cannot be met"):
        alpha.find_kappa(lambda kappa: 0.99 if kappa < 1 else 0.1, 0.8)
