"""Packed experts: the same mixture as from the weights that they stand for; a slice of a packed weight is its rows."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from sglang_er.engine.dual_experts import DualPrecisionExperts, mixture
from sglang_er.kernels import dequantize, quantize_pack
from sglang_er.twin.packed_linear import PackedLinear
from sglang_er.twin.twin import Twin

EXPERTS, HIDDEN, INNER, CHOSEN, GROUP = 5, 96, 48, 2, 32


def packed(*shape: int) -> tuple[PackedLinear, torch.Tensor]:
    """Of a random weight [experts, rows, columns]; and what it stands for."""
    weight = 0.1 * torch.randn(EXPERTS, *shape)
    linear = PackedLinear("experts", lambda: weight.flatten(0, 1), GROUP)
    return linear, dequantize(linear.packed).double().view(EXPERTS, *shape)


@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_the_mixture_is_that_of_the_dequantized_weights(tokens: int) -> None:
    """Another rank's experts (-1) add nothing."""
    torch.manual_seed(tokens)
    gate_up, w13 = packed(2 * INNER, HIDDEN)
    down, w2 = packed(HIDDEN, INNER)
    x = torch.randn(tokens, HIDDEN)
    experts = torch.rand(tokens, EXPERTS).argsort(-1)[:, :CHOSEN].to(torch.int32)
    experts[1::3, 0] = -1
    weights = torch.rand(tokens, CHOSEN)
    expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for token in range(tokens):
        for expert, weight in zip(experts[token].tolist(), weights[token].double()):
            if expert >= 0:
                gate, up = (w13[expert] @ x[token].double()).chunk(2)
                expected[token] += weight * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    got = mixture(x, weights, experts, gate_up, down, EXPERTS)
    assert got.dtype == x.dtype and got.shape == x.shape
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_packed_weight() -> None:
    whole = quantize_pack(torch.randn(80, 64), 32)
    part = whole.rows(16, 48)
    assert torch.equal(dequantize(part), dequantize(whole)[16:64])
    assert part.packed.data_ptr() == whole.packed[1:].data_ptr()
    for first, count in ((8, 16), (16, 8), (64, 32), (-16, 16)):
        with pytest.raises(ValueError, match="not whole blocks"):
            whole.rows(first, count)


def test_the_inner_method_is_no_module_of_the_layer() -> None:
    """SGLang's method is a torch module: registered in ours, which shares all it has, it would hang below itself."""
    inner = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(inner)
    inner.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    layer = torch.nn.Module()
    layer.quant_method = inner
    before = set(layer.state_dict())
    gate_up, down = packed(2 * INNER, HIDDEN)[0], packed(HIDDEN, INNER)[0]
    layer.quant_method = DualPrecisionExperts(inner, gate_up, down, Twin())
    assert set(layer.state_dict()) == before
    assert repr(layer).count("UnquantizedFusedMoEMethod") == 0 and layer.quant_method.inner is inner
    assert isinstance(layer.quant_method, UnquantizedFusedMoEMethod)
