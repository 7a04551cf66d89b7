"""Small random models for tests of exactness: flat distributions, where a wrong sampler shows and W4 drafts often fail.

With the usual initial deviation of 0.02 a random model repeats a few tokens and a draft is nearly always accepted,
which hides errors; with 0.05 and an untied output matrix it is not. The MLP is odd on purpose: 320 is no multiple of
the quantizer's group of 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sglang_er.models import tokenizer
from sglang_er.models.tiny import Shape, hf_config

if TYPE_CHECKING:
    import torch

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "qwen3_moe")
STD = 0.05
BIAS_STD = 0.05
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_MLP = 8, 2, 128
FLAT = Shape(hidden=256, layers=4, query_heads=4, kv_heads=2, head_dim=64, mlp=320, vocab=tokenizer.VOCAB_SIZE)


def config(arch: str, dtype: str) -> dict[str, Any]:
    """config.json of the flat model of `arch`."""
    moe = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": EXPERT_MLP,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
    }
    return hf_config(arch, FLAT, dtype, **(moe if arch == "qwen3_moe" else {}))


def _matrices(arch: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and size of every matrix of one layer, without the layer's prefix."""
    shape = FLAT
    query, kv = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for name, rows in (("q", query), ("k", kv), ("v", kv)):
        yield f"self_attn.{name}_proj", (rows, shape.hidden)
    yield "self_attn.o_proj", (shape.hidden, query)
    mlps = {"mlp": shape.mlp}
    if arch == "qwen3_moe":
        yield "mlp.gate", (EXPERTS, shape.hidden)
        mlps = {f"mlp.experts.{index}": EXPERT_MLP for index in range(EXPERTS)}
    for prefix, width in mlps.items():
        yield f"{prefix}.gate_proj", (width, shape.hidden)
        yield f"{prefix}.up_proj", (width, shape.hidden)
        yield f"{prefix}.down_proj", (shape.hidden, width)


def tensors(arch: str, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the flat model of `arch` by Hugging Face name, drawn from `seed`.

    Norm weights are near 1, Qwen2's biases are not 0: a kernel that forgets either gives wrong tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = STD, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * std + mean).to(dtype)

    yield "model.embed_tokens.weight", normal(FLAT.vocab, FLAT.hidden)
    for layer in range(FLAT.layers):
        prefix = f"model.layers.{layer}."
        for name, size in _matrices(arch):
            yield f"{prefix}{name}.weight", normal(*size)
            if arch == "qwen2" and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                yield f"{prefix}{name}.bias", normal(size[0], std=BIAS_STD)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", normal(FLAT.hidden, std=0.1, mean=1.0)
        if arch in ("qwen3", "qwen3_moe"):
            for name in ("q_norm", "k_norm"):
                yield f"{prefix}self_attn.{name}.weight", normal(FLAT.head_dim, std=0.1, mean=1.0)
    yield "model.norm.weight", normal(FLAT.hidden, std=0.1, mean=1.0)
    yield "lm_head.weight", normal(FLAT.vocab, FLAT.hidden)
