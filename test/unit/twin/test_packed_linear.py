"""A layer of the twin keeps the layout and the buffers that it was made with, and multiplies in either layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sglang_er import kernels
from sglang_er.kernels import MarlinWeight, PackedWeight, registry
from sglang_er.twin.packed_linear import PackedLinear
from sglang_er.twin.twin import Twin


@pytest.fixture
def marlin_named(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv(registry.ENVIRONMENT, "marlin,cpu,reference")
    registry.candidates.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    registry.candidates.cache_clear()


def test_marlins_layout_is_remade_in_place_whatever_is_named_later(marlin_named: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    weight = torch.randn(128, 256)
    layer = PackedLinear("layer", lambda: weight, group_size=64)
    assert isinstance(layer.packed, MarlinWeight) and layer.layout == "marlin" and layer.nbytes == layer.packed.nbytes
    addresses = [buffer.data_ptr() for buffer in layer.packed.buffers]
    weight.copy_(torch.randn(128, 256))
    layer.repack()
    assert [buffer.data_ptr() for buffer in layer.packed.buffers] == addresses
    found = kernels.dequantize(layer.packed, implementation="reference")
    assert (found - weight).norm() < 0.1 * weight.norm()


def test_it_multiplies_with_activations_as_they_are(marlin_named: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    weight, x, bias = torch.randn(64, 128), torch.randn(2, 3, 128), torch.randn(64)
    layer = PackedLinear("layer", lambda: weight, group_size=32, int8_activations=True)
    found = layer(x, bias)
    truth = x @ kernels.dequantize(layer.packed, implementation="reference").T + bias
    assert found.shape == (2, 3, 64) and torch.allclose(found, truth, atol=1e-4)


def test_our_own_layout_where_it_is_asked_for(marlin_named: pytest.MonkeyPatch) -> None:
    """As experts do, whose rows are read apart."""
    weight = torch.randn(128, 256)
    layer = PackedLinear("experts", lambda: weight, group_size=64, own_layout=True)
    assert isinstance(layer.packed, PackedWeight)
    layer.repack()
    assert layer(torch.randn(2, 256)).shape == (2, 128)


def test_buffers_alone_are_made_inside_the_region(marlin_named: pytest.MonkeyPatch) -> None:
    """A choice of the layout may try kernels and keep what they need: none of it may go when the buffers go."""
    said, layout_for, quantize_pack = [], kernels.layout_for, kernels.quantize_pack

    @contextmanager
    def region() -> Iterator[None]:
        said.append("in")
        yield
        said.append("out")

    marlin_named.setattr(kernels, "layout_for", lambda *a: said.append("layout") or layout_for(*a))
    marlin_named.setattr(kernels, "quantize_pack", lambda *a, **o: said.append("pack") or quantize_pack(*a, **o))
    weight = torch.randn(64, 256)
    assert isinstance(PackedLinear("layer", lambda: weight, 128, region=region).packed, MarlinWeight)
    assert said == ["layout", "in", "out", "pack"]


def test_the_twin_says_in_which_layouts_it_is(marlin_named: pytest.MonkeyPatch) -> None:
    weights = torch.randn(128, 256), torch.randn(80, 256)
    layers = [PackedLinear("layer", lambda w=w: w, group_size=128) for w in weights]
    described = Twin(layers=layers).describe()
    assert described["layouts"] == {"marlin": 1, "own": 1}
    nbytes = 128 * 256 * (4 + 20 / 128) / 8 + 80 * 256 * 4.25 / 8
    assert described["nbytes"] == nbytes
    assert described["bits_per_weight"] == round(8 * nbytes / (208 * 256), 4)
