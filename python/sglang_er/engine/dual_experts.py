"""The twin's experts: a second, packed precision for SGLang's fused mixture-of-experts layers, chosen by the switch.

All experts of a layer are one packed weight, expert after expert, remade in one pass. Which experts a batch needs is
read on the host, so this is for CPUs: on a GPU a draft pass must not wait for the device, and experts stay exact until
a grouped kernel reads these buffers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from torch.nn.functional import silu

from sglang_er import kernels
from sglang_er.kernels.base import ROW_BLOCK

if TYPE_CHECKING:
    from torch import nn

    from sglang_er.engine.dual_precision import Pack
    from sglang_er.twin.packed_linear import PackedLinear
    from sglang_er.twin.twin import Twin


class DualPrecisionExperts(UnquantizedFusedMoEMethod):
    """The layer's own method, or the twin's packed experts while the twin is drafting."""

    def __init__(self, inner: UnquantizedFusedMoEMethod, gate_up: PackedLinear, down: PackedLinear, twin: Twin) -> None:
        # Everything else that SGLang asks of the method is the inner one's, its forward of this platform included.
        self.__dict__.update(inner.__dict__)
        # Both are torch modules that share what is registered: by assignment the inner one would become its own child.
        self.__dict__["inner"] = inner
        self.twin, self.gate_up, self.down = twin, gate_up, down

    def apply(self, layer: nn.Module, dispatch_output: Any) -> Any:
        if not self.twin.drafting:
            return self.inner.apply(layer, dispatch_output)
        weights, experts, *_ = dispatch_output.topk_output
        out = mixture(dispatch_output.hidden_states, weights, experts, self.gate_up, self.down, layer.num_local_experts)
        return StandardCombineInput(hidden_states=out)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)
        self.twin.policy_changed()


def mixture(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: PackedLinear,
    down: PackedLinear,
    count: int,
) -> torch.Tensor:
    """x [T, H], weights and experts [T, k] -> [T, H]: sum over k of weight * down(silu(gate(x)) * up(x)) of that expert
    out of `count`, in fp32; experts below 0 are another rank's."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    first, second = (packed.packed.out_features // count for packed in (gate_up, down))
    for expert in experts.unique().tolist():
        if expert < 0:
            continue
        token, choice = (experts == expert).nonzero(as_tuple=True)
        both = kernels.w4a16_linear(x[token], gate_up.packed.rows(expert * first, first))
        gate, up = both.chunk(2, dim=-1)
        result = kernels.w4a16_linear(silu(gate) * up, down.packed.rows(expert * second, second))
        out.index_add_(0, token, result.float() * weights[token, choice, None].float())
    return out.to(x.dtype)


def refusal(layer: Any) -> str | None:
    """Why the experts of a FusedMoE stay exact; None where they are quantized."""
    method, config, weight = layer.quant_method, layer.moe_runner_config, getattr(layer, "w13_weight", None)
    if type(method) is not UnquantizedFusedMoEMethod or weight is None or weight.dim() != 3:
        return type(method).__name__
    if weight.device.type != "cpu":
        return "no kernel for experts on a GPU"
    if config.activation != "silu" or config.gemm1_alpha is not None or config.apply_router_weight_on_input:
        return f"activation {config.activation}"
    if getattr(layer, "w13_weight_bias", None) is not None:
        return "biases"
    if weight.shape[1] % ROW_BLOCK or layer.w2_weight.shape[1] % ROW_BLOCK:
        return f"sizes that are no multiple of {ROW_BLOCK}"
    return None


def install_experts(twin: Twin, name: str, layer: Any, pack: Pack) -> None:
    """Pack the experts of one layer, of which `refusal` says nothing."""
    gate_up = pack(f"{name}.w13_weight", lambda: layer.w13_weight.data.flatten(0, 1))
    down = pack(f"{name}.w2_weight", lambda: layer.w2_weight.data.flatten(0, 1))
    twin.layers += [gate_up, down]
    layer.quant_method = DualPrecisionExperts(layer.quant_method, gate_up, down, twin)
