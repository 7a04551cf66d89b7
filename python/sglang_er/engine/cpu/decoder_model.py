"""Reads a Llama-like SGLang model as the native decoder wants it: one dictionary of tensors per layer.

Only exact class names are accepted: a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from sglang_er.engine import compat
from sglang_er.engine.draft_attention import window_of

if TYPE_CHECKING:
    from torch import nn

Fields = dict[str, Any]
# linear module -> its tensors under `weight`, or `packed` and `scales_zeros`
LinearTensors = Callable[[Any], Fields]

_MODELS = frozenset({"LlamaModel", "Qwen2Model", "Qwen3Model", "MistralModel"})
_LAYERS = frozenset({"LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "MistralDecoderLayer"})
# Anything else (a LoRA wrapper, for one) computes more than a product.
_LINEARS = frozenset({"QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"})
# All of them put their scaling into the table of cosines and sines.
_ROTARY = frozenset(
    {"RotaryEmbedding", "Llama3RotaryEmbedding", "LinearScalingRotaryEmbedding", "YaRNScalingRotaryEmbedding"}
)


class UnsupportedModelError(Exception):
    """The model stays with SGLang's own code; the message says why."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedModelError(reason)


def exact(module: Any) -> Fields:
    """A linear's live parameter."""
    return {"weight": module.weight.data}


def check(model: nn.Module) -> None:
    """Raises UnsupportedModelError unless the decoder computes what `model` computes."""
    body = getattr(model, "model", None)
    _require(type(body).__name__ in _MODELS, f"{type(model).__name__} is not a model that it knows")
    assert body is not None
    _require(not getattr(body, "layers_to_capture", None), "hidden states are captured")
    _require(not hasattr(body.config, "scale_emb"), "embeddings are scaled")
    windows = set()
    for layer in body.layers:
        _require(type(layer).__name__ in _LAYERS, f"a layer is a {type(layer).__name__}")
        attention, mlp = layer.self_attn, layer.mlp
        _require(type(mlp.act_fn).__name__ == "SiluAndMul", f"the activation is {type(mlp.act_fn).__name__}")
        _require(
            type(attention.rotary_emb).__name__ in _ROTARY, f"positions are a {type(attention.rotary_emb).__name__}"
        )
        for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
            _require(type(linear).__name__ in _LINEARS, f"a linear layer is a {type(linear).__name__}")
            _require(isinstance(linear.quant_method, UnquantizedLinearMethod), "a linear layer is quantized")
            _require(compat.adapter().shards(linear) == 1, "the model is sharded")
        for norm in _norms(layer):
            plain = not (norm.cast_x_before_out_mul or norm.fp32_residual or norm.variance_size_override)
            _require(plain and norm.has_weight, "a norm is not a plain RMSNorm")
        radix = attention.attn
        _require(not radix.logit_cap and radix.qk_head_dim == radix.v_head_dim, "attention has a logit cap")
        windows.add(window_of(radix))
    _require(len(windows) == 1, "layers differ in their sliding windows")


def _norms(layer: Any) -> list[Any]:
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if getattr(layer.self_attn, "q_norm", None) is not None:
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
    return norms


def read(model: nn.Module, pool: Any, linear: LinearTensors, lm_head: Fields | None) -> tuple[Fields, list[Fields]]:
    """(config, layers) for `kernels.cpu.decoder.Decoder`; `lm_head` None leaves the logits to somebody else."""
    body: Any = model.model
    first = body.layers[0].self_attn
    rotary = first.rotary_emb
    config: Fields = {
        "hidden_size": body.embed_tokens.weight.shape[1],
        "intermediate_size": body.layers[0].mlp.down_proj.weight.shape[1],
        "vocab_size": model.lm_head.weight.shape[0],
        "q_heads": first.attn.tp_q_head_num,
        "kv_heads": first.attn.tp_k_head_num,
        "head_dim": first.attn.qk_head_dim,
        "rotary_dim": rotary.rotary_dim,
        "neox": int(rotary.is_neox_style),
        "window": window_of(first.attn),
        "eps": float(body.norm.variance_epsilon),
        "attention_scale": float(first.attn.scaling),
        "embedding": body.embed_tokens.weight.data,
        "cos_sin": rotary.cos_sin_cache,
        "final_norm": body.norm.weight.data,
        "lm_head": int(lm_head is not None),
        "group_size": 0,
        "int8_activations": 0,
        "shadow_bits": 0,
    }
    if lm_head is not None:
        config |= {f"lm_head.{name}": tensor for name, tensor in lm_head.items()}
    return config, [_layer(layer, pool, linear) for layer in body.layers]


def _layer(layer: Any, pool: Any, linear: LinearTensors) -> Fields:
    attention, mlp = layer.self_attn, layer.mlp
    fields: Fields = {
        "input_norm": layer.input_layernorm.weight.data,
        "post_norm": layer.post_attention_layernorm.weight.data,
        "keys": pool.get_key_buffer(attention.attn.layer_id),
        "values": pool.get_value_buffer(attention.attn.layer_id),
    }
    if getattr(attention, "q_norm", None) is not None:
        fields |= {"q_norm": attention.q_norm.weight.data, "k_norm": attention.k_norm.weight.data}
    linears = {
        "qkv": attention.qkv_proj,
        "o": attention.o_proj,
        "gate_up": mlp.gate_up_proj,
        "down": mlp.down_proj,
    }
    for name, module in linears.items():
        fields |= {f"{name}.{part}": tensor for part, tensor in linear(module).items()}
        if getattr(module, "bias", None) is not None:
            fields[f"{name}.bias"] = module.bias.data
    return fields


def tensors(config: Fields, layers: list[Fields]) -> list[torch.Tensor]:
    """All tensors of `read`'s result."""
    return [value for fields in (config, *layers) for value in fields.values() if isinstance(value, torch.Tensor)]


class AddressWatch:
    """Notices that a tensor which a decoder reads lies elsewhere now (a weight loader may replace a Parameter)."""

    def __init__(self, model: nn.Module, pool: Any) -> None:
        body: Any = model.model
        self._tables: list[tuple[dict[str, Any], str]] = []
        for module in model.modules():
            self._tables += [
                (module._parameters, name) for name, value in module._parameters.items() if value is not None
            ]
        rotary = {id(layer.self_attn.rotary_emb): layer.self_attn.rotary_emb for layer in body.layers}
        self._tables += [(module._buffers, "cos_sin_cache") for module in rotary.values()]
        self._pool = pool
        self._seen = self._addresses()

    def _addresses(self) -> list[int]:
        addresses = [table[name].data_ptr() for table, name in self._tables]
        return [*addresses, id(self._pool.k_buffer), self._pool.k_buffer[0].data_ptr()]

    def moved(self) -> bool:
        """True once after each change."""
        addresses = self._addresses()
        if addresses == self._seen:
            return False
        self._seen = addresses
        return True
