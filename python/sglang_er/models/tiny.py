"""The two small trained models: their shape, their Hugging Face configs, their committed weights.

One has QK norm (family ``qk_norm``: Qwen3), one has none (family ``plain``: Llama, and Qwen2 with zero biases, and
Mistral). Residual coordinate 0 is 1 at every position and layer: the embedding sets it, no layer writes it. `expand`
uses it as a constant that lets unused vocabulary rows be pushed out of the distribution.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_er.models import tokenizer

if TYPE_CHECKING:
    import torch

#: Architecture name -> family of trained weights that it can hold.
FAMILY = {"qwen3": "qk_norm", "qwen2": "plain", "llama": "plain", "mistral": "plain"}
ARCHITECTURES = tuple(FAMILY)
_CLASS = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True)
class Shape:
    """Layer sizes of a decoder, which decide its speed. The output matrix is not tied to the embedding."""

    hidden: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int = tokenizer.MAX_LENGTH
    eps: float = 1e-6
    rope_theta: float = 10000.0

    def parameters(self) -> int:
        """Number of weights in matrices, norms and biases not counted."""
        attention = self.hidden * self.head_dim * 2 * (self.query_heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp) + 2 * self.vocab * self.hidden


TINY = Shape(hidden=256, layers=4, query_heads=4, kv_heads=1, head_dim=64, mlp=256, vocab=tokenizer.VOCAB_SIZE)


def hf_config(arch: str, shape: Shape, dtype: str = "bfloat16", **extra: Any) -> dict[str, Any]:
    """config.json of a checkpoint: the fields that transformers 5 and SGLang 0.5.21 read.

    Raises ValueError for an unknown `arch`.
    """
    if arch not in _CLASS:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(_CLASS)}")
    ids = tokenizer.special_ids()
    config: dict[str, Any] = {
        "architectures": [_CLASS[arch]],
        "model_type": arch,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "dtype": dtype,
        "pad_token_id": ids["pad"],
        "bos_token_id": None,
        "eos_token_id": ids["eos"],
        "use_cache": True,
    }
    if arch in ("qwen3", "llama", "qwen3_moe"):
        config["attention_bias"] = False
    if arch in ("qwen3", "qwen2", "qwen3_moe"):
        config |= {"use_sliding_window": False, "sliding_window": None}
    if arch == "llama":
        config["mlp_bias"] = False
    if arch == "mistral":
        config["sliding_window"] = None
    return config | extra


def weights_path(arch: str) -> Path:
    """The committed file that holds `arch`'s trained weights (`read_weights`)."""
    if arch not in FAMILY:
        raise ValueError(f"no trained weights for architecture {arch!r}: choose one of {', '.join(FAMILY)}")
    return Path(str(resources.files(__package__) / "assets" / f"tiny_{FAMILY[arch]}.safetensors.xz"))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, which xz may have packed (.xz): bf16 weights keep three quarters of their size."""
    from safetensors.torch import load

    packed = path.read_bytes()
    tensors: dict[str, torch.Tensor] = load(lzma.decompress(packed) if path.suffix == ".xz" else packed)
    return tensors


def write_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """What `read_weights` reads."""
    from safetensors.torch import save

    plain = save(weights, metadata={"format": "pt"})
    path.write_bytes(lzma.compress(plain, preset=9) if path.suffix == ".xz" else plain)


def load_weights(arch: str) -> dict[str, torch.Tensor]:
    """The trained tensors of `arch`, bf16, by Hugging Face name. Qwen2's q, k and v biases are added as zeros."""
    import torch

    weights = read_weights(weights_path(arch))
    if arch == "qwen2":
        for layer in range(TINY.layers):
            for name in ("q_proj", "k_proj", "v_proj"):
                prefix = f"model.layers.{layer}.self_attn.{name}"
                weights[f"{prefix}.bias"] = torch.zeros(weights[f"{prefix}.weight"].shape[0], dtype=torch.bfloat16)
    return weights


def freeze_constant(model: torch.nn.Module) -> None:
    """Put residual coordinate 0 back to 1 after an optimizer's step: no layer writes it, the embedding sets it."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0].zero_()
            elif name.endswith("embed_tokens.weight"):
                parameter[:, 0] = 1.0
