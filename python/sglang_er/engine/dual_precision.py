"""Installs the twin on a loaded SGLang model: every linear gets a second, packed precision chosen by a switch.

Nothing of ours is registered on a module, so state_dict, weight checks, checkpoints and memory-saver exports see
the target alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from sglang_er.engine import dual_experts
from sglang_er.engine.shards import check_shard
from sglang_er.twin.packed_linear import PackedLinear
from sglang_er.twin.twin import Twin

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

LM_HEAD = "lm_head"

# (name, where the live weight is) -> its packed copy
Pack = Callable[[str, Callable[[], torch.Tensor]], PackedLinear]


class DualPrecisionMethod(UnquantizedLinearMethod):
    """The layer's own method, or the twin's packed weights while the twin is drafting.

    A subclass of the stock method because model code asks isinstance() of it; its other entry points
    (apply_into, apply_with_addend) stay exact.
    """

    def __init__(self, inner: UnquantizedLinearMethod, packed: PackedLinear, twin: Twin) -> None:
        super().__init__()
        self.__dict__.update(inner.__dict__)
        self.inner = inner
        self.packed = packed
        self.twin = twin

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.twin.drafting:
            return self.packed(x, bias)
        return self.inner.apply(layer, x, bias)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)
        # Disk updates and end_weight_update come through here even when only the target was selected.
        self.twin.policy_changed()


def install_twin(
    model: nn.Module,
    group_size: int,
    quantize_lm_head: bool,
    region: Callable[[], AbstractContextManager[None]] = nullcontext,
    clip_search: bool = False,
) -> Twin:
    """Wrap every unquantized linear of `model` and, if asked, the lm_head; returns the twin, freshly made.

    Its buffers, and nothing else, are allocated inside `region()`.
    """
    twin = Twin()
    pack = partial(PackedLinear, group_size=group_size, clip_search=clip_search, region=region)
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            _install_linear(twin, name, module, pack, group_size)
        elif isinstance(module, FusedMoE):
            if reason := dual_experts.refusal(module):
                twin.skipped.append(f"{name} (MoE experts: {reason})")
            else:
                inputs = module.w2_weight.shape[2]
                check_shard(f"{name}.w2_weight", inputs, inputs * module.moe_tp_size, group_size)
                dual_experts.install_experts(twin, name, module, partial(pack, own_layout=True))
    if quantize_lm_head:
        _install_lm_head(twin, model, pack)
    else:
        twin.skipped.append("lm_head (quantize_lm_head=false)")
    if not twin.layers:
        raise RuntimeError("sglang-er: the model has no linear layer that can be quantized; serve it with --plain")
    if twin.skipped:
        logger.info("sglang-er: layers that stay exact in the twin: %s", ", ".join(twin.skipped))
    summary = twin.describe()
    logger.info(
        "sglang-er: twin of %s linears, %.1f MB, %s bits per weight, group %d%s, in the layout %s",
        summary["layers"],
        sum(layer.nbytes for layer in twin.layers) / 1e6,
        summary["bits_per_weight"],
        group_size,
        ", clip search" if clip_search else "",
        ", ".join(f"{name} {count}" for name, count in Counter(layer.layout for layer in twin.layers).items()),
    )
    return twin


def _install_linear(twin: Twin, name: str, module: LinearBase, pack: Pack, group_size: int) -> None:
    method = module.quant_method
    weight = getattr(module, "weight", None)
    if type(method) is not UnquantizedLinearMethod or weight is None or weight.dim() != 2:
        twin.skipped.append(f"{name} ({type(method).__name__})")
        return
    check_shard(name, weight.shape[1], module.input_size, group_size)
    packed = pack(name, lambda: module.weight.data)
    twin.layers.append(packed)
    module.quant_method = DualPrecisionMethod(method, packed, twin)


def _install_lm_head(twin: Twin, model: nn.Module, pack: Pack) -> None:
    """The lm_head is no LinearBase (it may be the embedding): the switch sits in the logits processor instead."""
    head = getattr(model, "lm_head", None)
    processor = getattr(model, "logits_processor", None)
    if head is None or not isinstance(processor, LogitsProcessor) or getattr(head, "bias", None) is not None:
        twin.skipped.append("lm_head (no plain lm_head on this model)")
        return
    packed = pack(LM_HEAD, lambda: head.weight.data)
    twin.layers.append(packed)
    exact = processor._compute_lm_head

    def compute_lm_head(
        hidden_states: torch.Tensor, lm_head: nn.Module, embedding_bias: torch.Tensor | None = None, **buffer: Any
    ) -> torch.Tensor:
        if twin.drafting and lm_head is head and embedding_bias is None:
            return packed(hidden_states.to(head.weight.dtype))
        logits: torch.Tensor = exact(hidden_states, lm_head, embedding_bias, **buffer)
        return logits

    processor._compute_lm_head = compute_lm_head
