"""The twin's experts: a second, packed precision for SGLang's fused mixture-of-experts layers, chosen by the switch.

All experts of a layer are one packed weight in our own layout, expert after expert, remade in one pass. On a GPU they
are quantized where a kernel of ours reads these buffers: plain torch would compute every expert for every token, exact
ones are faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from sglang_er import kernels
from sglang_er.kernels import registry
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
        x = dispatch_output.hidden_states
        # Experts below 0 are another rank's; that SGLang adds the ranks' results is as it is for exact experts.
        out = kernels.w4a16_experts(x, self.gate_up.packed, self.down.packed, experts, weights)
        return StandardCombineInput(hidden_states=out)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)
        self.twin.policy_changed()


def refusal(layer: Any) -> str | None:
    """Why the experts of a FusedMoE stay exact in the twin; None where they are quantized."""
    method, config, weight = layer.quant_method, layer.moe_runner_config, getattr(layer, "w13_weight", None)
    if type(method) is not UnquantizedFusedMoEMethod or weight is None or weight.dim() != 3:
        return type(method).__name__
    if weight.device.type != "cpu":
        if not registry.has_kernel("w4a16_experts", weight.device, weight.dtype):
            return "no kernel is seen correct on a GPU: --er-kernels cuda,triton,reference tries one"
        if not method.runner.runner_backend.is_triton() or getattr(method, "w13_swiglu_interleaved", False):
            return "weights in the layout of another runner: --moe-runner-backend triton"
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
