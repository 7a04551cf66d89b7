"""The arithmetic that the expansion is measured with, in plain torch: int4 rounding and one decoder layer.

Weights of a layer are a dict by Hugging Face name without the layer's prefix (``self_attn.q_proj.weight``, ...), fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_er.models.tiny import Shape

if TYPE_CHECKING:
    import torch

    Weights = dict[str, torch.Tensor]
    KV = tuple[torch.Tensor, torch.Tensor]

GROUP = 128


def fake_quantize(weight: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """Round a matrix [out, in] to asymmetric int4 in groups of `group` along the input, and back.

    Per group: scale = (max - min) / 15 and zero = min, both rounded to bf16; q = round((w - zero) / scale) in 0..15;
    result = q * scale + zero. An input size that is no multiple of `group` is padded with zeros.
    """
    import torch

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    low, high = padded.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float().clamp_(min=1e-30)
    zero = low.bfloat16().float()
    levels = padded.sub(zero).div_(scale).round_().clamp_(0, 15)
    return levels.mul_(scale).add_(zero).view(rows, -1)[:, :columns]


def quantize_layer(weights: Weights) -> Weights:
    """`fake_quantize` on every matrix of a layer; norms and biases stay as they are."""
    return {name: fake_quantize(value) if value.dim() == 2 else value for name, value in weights.items()}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension."""
    import torch

    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of [batch, heads, length, head_dim] at positions 0.., halves paired (the NeoX layout)."""
    import torch

    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequencies).float()
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _heads(weights: Weights, name: str, x: torch.Tensor, count: int, shape: Shape) -> torch.Tensor:
    """The q, k or v heads [batch, count, length, head_dim] of normed input, with bias and QK norm if there are any."""
    projected = x @ weights[f"self_attn.{name}_proj.weight"].T
    if f"self_attn.{name}_proj.bias" in weights:
        projected = projected + weights[f"self_attn.{name}_proj.bias"]
    projected = projected.unflatten(-1, (count, shape.head_dim)).transpose(1, 2)
    if f"self_attn.{name}_norm.weight" in weights:
        projected = rms_norm(projected, weights[f"self_attn.{name}_norm.weight"], shape.eps)
    return projected if name == "v" else _rotate(projected, shape.rope_theta)


def keys_values(weights: Weights, x: torch.Tensor, shape: Shape) -> KV:
    """Keys and values [batch, kv_heads, length, head_dim] of a layer whose input is x [batch, length, hidden]."""
    normed = rms_norm(x, weights["input_layernorm.weight"], shape.eps)
    return _heads(weights, "k", normed, shape.kv_heads, shape), _heads(weights, "v", normed, shape.kv_heads, shape)


def layer_forward(weights: Weights, x: torch.Tensor, shape: Shape, context: KV | None = None) -> torch.Tensor:
    """One decoder layer on x [batch, length, hidden], causal, fp32.

    With `context`, every position attends to the context's keys and values before it and to its own at its place: what
    a draft step sees that reads the target's KV cache.
    """
    import torch

    normed = rms_norm(x, weights["input_layernorm.weight"], shape.eps)
    query = _heads(weights, "q", normed, shape.query_heads, shape)
    key, value = keys_values(weights, x, shape)
    repeat = shape.query_heads // shape.kv_heads
    own_key, own_value = (part.repeat_interleave(repeat, 1) for part in (key, value))
    past_key, past_value = (part.repeat_interleave(repeat, 1) for part in (context or (key, value)))
    scores = query @ past_key.transpose(-1, -2)
    length = x.shape[1]
    past = torch.ones(length, length, dtype=torch.bool).tril(-1)
    own = torch.eye(length, dtype=torch.bool)
    scores = torch.where(own, (query * own_key).sum(-1, keepdim=True), scores.masked_fill(~past, float("-inf")))
    chance = (scores * shape.head_dim**-0.5).softmax(-1)
    mixed = (chance * past) @ past_value + chance.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * own_value
    x = x + mixed.transpose(1, 2).flatten(2) @ weights["self_attn.o_proj.weight"].T
    normed = rms_norm(x, weights["post_attention_layernorm.weight"], shape.eps)
    gate = torch.nn.functional.silu(normed @ weights["mlp.gate_proj.weight"].T)
    return x + (gate * (normed @ weights["mlp.up_proj.weight"].T)) @ weights["mlp.down_proj.weight"].T
