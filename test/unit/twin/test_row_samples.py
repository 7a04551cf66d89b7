"""The sampled rows notice a write that touches them, whatever its values, and raise no alarm without one."""

from __future__ import annotations

import pytest
import torch

from sglang_er.twin.packed_linear import PackedLinear
from sglang_er.twin.row_samples import ROWS, RowSamples
from sglang_er.twin.twin import StaleTwin, Twin


def weights(dtype: torch.dtype, shapes: tuple[tuple[int, int], ...] = ((96, 64), (160, 96), (2, 32))) -> list:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def watched(held: list[torch.Tensor], seed: int = 0) -> RowSamples:
    layers = [PackedLinear(f"layer{i}", lambda w=w: w, group_size=32) for i, w in enumerate(held)]
    samples = RowSamples(layers, seed)
    samples.take()
    return samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_an_optimizer_is_seen_in_every_layer(dtype: torch.dtype) -> None:
    held = weights(dtype)
    samples = watched(held)
    assert samples.changed() == []
    for weight in held:
        weight.mul_(1.01)
    assert samples.changed() == ["layer0", "layer1", "layer2"]
    samples.take()
    assert samples.changed() == []


def test_only_the_written_layer_is_named() -> None:
    held = weights(torch.bfloat16)
    samples = watched(held)
    held[1].neg_()
    assert samples.changed() == ["layer1"]


def test_any_bit_of_a_sampled_row_counts() -> None:
    """Also a sign of zero, a NaN, and two equal changes that cancel in a plain sum."""
    held = [torch.zeros(1, 64)]
    for write in (
        lambda w: w[0, 7].neg_(),
        lambda w: w[0, 8].fill_(float("nan")),
        lambda w: w[0, :2].copy_(w[0, :2].flip(0) + torch.tensor([1.0, 0.0])),
        lambda w: w.copy_(w.roll(1, 1)),
    ):
        samples = watched(held)
        before = held[0].clone()
        write(held[0])
        assert not torch.equal(held[0].view(torch.int32), before.view(torch.int32))
        assert samples.changed() == ["layer0"]


def test_rows_are_drawn_anew_so_that_no_place_is_missed_for_good() -> None:
    """The documented limit: a single row in 96 is seen with about 4 / 96 a time; after enough takings it is."""
    held = weights(torch.float32)
    samples = watched(held)
    seen = 0
    for _ in range(300):
        samples.take()
        held[0][11].add_(1.0)
        seen += bool(samples.changed())
    assert 0 < seen < 4 * 300 * ROWS / 96


def test_nothing_is_said_before_anything_was_taken() -> None:
    assert RowSamples([PackedLinear("only", lambda: torch.ones(4, 32), group_size=32)]).changed() == []


def test_a_stale_twin_may_not_draft_where_that_is_checked() -> None:
    twin = Twin(check_epochs=True)
    twin.about_to_draft()
    twin.policy_changed()
    with pytest.raises(StaleTwin, match="weight epoch 1 drafts at weight epoch 2"):
        twin.about_to_draft()
    twin.requantize()
    twin.about_to_draft()
    twin.policy_changed()
    twin.check_epochs = False
    twin.about_to_draft()
