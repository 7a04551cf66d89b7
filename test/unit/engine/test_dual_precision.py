"""The twin must leave no trace on the model: trainers, weight checks and checkpoints see the target's tensors alone."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from sglang_er.config import ConfigError
from sglang_er.engine.dual_precision import install_twin
from sglang_er.kernels import quantize_pack, registry
from sglang_er.twin.twin import Twin


class Block(torch.nn.Module):
    """Two linears, one with a bias, and something that is no linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(96)
        self.up = ReplicatedLinear(96, 160, bias=True, params_dtype=torch.float32)
        self.down = ReplicatedLinear(160, 96, bias=False, params_dtype=torch.float32)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(x))[0])[0]


class Wide(Block):
    """One linear that Marlin takes, and one that it does not."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        torch.manual_seed(0)
        self.norm = torch.nn.Identity()
        self.up = ReplicatedLinear(256, 192, bias=True, params_dtype=torch.float32)
        self.down = ReplicatedLinear(192, 256, bias=False, params_dtype=torch.float32)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.05)


@pytest.fixture
def block() -> Block:
    return Block()


def install(block: Block) -> Twin:
    return install_twin(block, group_size=32, quantize_lm_head=False)


def test_model_shows_no_tensor_of_the_twin(block: Block) -> None:
    """Same state_dict (names, values, storage), buffers and modules before and after, and after drafting."""
    before = dict(block.state_dict(keep_vars=True))
    modules = [name for name, _ in block.named_modules()]
    twin = install(block)
    with torch.no_grad(), twin.draft_pass():
        block(torch.randn(3, 96))
    after = dict(block.state_dict(keep_vars=True))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert not list(block.buffers())
    assert [name for name, _ in block.named_modules()] == modules
    ours = {id(tensor) for layer in twin.layers for tensor in (layer.packed.packed, layer.packed.scales_zeros)}
    assert len(ours) == 4
    for module in block.modules():
        assert not ours & {id(value) for value in vars(module).values()}


@torch.no_grad()
def test_exact_outside_the_draft_pass_only(block: Block) -> None:
    """Bitwise the model's own output outside; inside that of 4-bit weights: another one, but a close one."""
    x = torch.randn(5, 96)
    expected = block(x)
    twin = install(block)
    with twin.draft_pass():
        drafted = block(x)
    assert torch.equal(block(x), expected)
    assert not torch.equal(drafted, expected)
    assert (drafted - expected).norm() < 0.3 * expected.norm()
    with pytest.raises(KeyError), twin.draft_pass():
        raise KeyError("a draft that fails must not leave the switch on")
    assert torch.equal(block(x), expected)


@torch.no_grad()
def test_requantizing_follows_the_weights_in_place(block: Block) -> None:
    """After new weights the twin is stale; remade, it equals a twin of those weights, in the same buffers."""
    x = torch.randn(5, 96)
    twin = install(block)
    addresses = [layer.packed.packed.data_ptr() for layer in twin.layers]
    for parameter in block.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.05)
    # What SGLang calls after loading weights, on the layer's own method.
    block.up.quant_method.process_weights_after_loading(block.up)
    assert twin.stale
    with twin.draft_pass():
        stale = block(x)
    twin.requantize()
    assert not twin.stale
    with twin.draft_pass():
        remade = block(x)
    fresh = Block()
    fresh.load_state_dict(block.state_dict())
    with install(fresh).draft_pass():
        assert torch.equal(fresh(x), remade)
    assert not torch.equal(stale, remade)
    assert [layer.packed.packed.data_ptr() for layer in twin.layers] == addresses


def test_method_is_still_sglangs(block: Block) -> None:
    """Model code asks isinstance() of the method."""
    install(block)
    assert isinstance(block.up.quant_method, UnquantizedLinearMethod)


def test_every_rank_has_whole_groups(block: Block) -> None:
    block.down.input_size = 320  # as on two ranks, 160 inputs each
    with pytest.raises(ConfigError, match=r"down, no multiple of --er-group-size 64: use --er-group-size 32 or fewer"):
        install_twin(block, group_size=64, quantize_lm_head=False)
    whole = Block()
    whole.down.input_size = 320
    assert len(install(whole).layers) == 2


@torch.no_grad()
def test_layers_that_marlin_takes_are_in_its_layout(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """The others keep ours, and the model computes with both."""
    monkeypatch.setenv(registry.ENVIRONMENT, "marlin,cpu,reference")
    registry.candidates.cache_clear()
    block, x = Wide(), torch.randn(5, 256)
    with caplog.at_level("INFO"):
        twin = install_twin(block, group_size=64, quantize_lm_head=False)
    assert [layer.layout for layer in twin.layers] == ["marlin", "own"]
    assert "in the layout marlin 1, own 1" in caplog.text
    expected = block(x)
    with twin.draft_pass():
        drafted = block(x)
    assert 0 < (drafted - expected).norm() < 0.3 * expected.norm()
    registry.candidates.cache_clear()


def test_clip_search_holds_for_every_layer_and_every_update(block: Block) -> None:
    twin = install_twin(block, group_size=32, quantize_lm_head=False, clip_search=True)
    assert twin.describe()["clip_search"] is True and install(Block()).describe()["clip_search"] is False
    torch.nn.init.normal_(block.up.weight)
    twin.requantize()
    for layer in twin.layers:
        searched, plain = (quantize_pack(layer.source(), 32, clip_search=clip) for clip in (True, False))
        assert torch.equal(layer.packed.packed, searched.packed)
        assert torch.equal(layer.packed.scales_zeros, searched.scales_zeros)
        assert not torch.equal(layer.packed.scales_zeros, plain.scales_zeros)
