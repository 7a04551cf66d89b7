"""Whether ranks that share a layer's inputs have whole groups of them."""

from __future__ import annotations

from typing import Any

from sglang_er.config import ConfigError

_SIZES = "num_attention_heads", "num_key_value_heads", "intermediate_size"
_EXPERTS = "moe_intermediate_size", "num_experts", "num_local_experts"
_CPU_MULTIPLE = 32


def check_shard(name: str, inputs: int, of: int, group_size: int) -> None:
    """Of a layer whose inputs are divided among ranks, each has whole groups: else each would pad its last one. Raises
    ConfigError."""
    if inputs == of or inputs % group_size == 0:
        return
    fitting = [size for size in (64, 32) if inputs % size == 0 and size < group_size]
    advice = f"use --er-group-size {fitting[0]} or fewer ranks" if fitting else "use fewer ranks"
    raise ConfigError(
        f"every rank has {inputs} of the {of} inputs of {name}, no multiple of --er-group-size {group_size}: {advice}"
    )


def check_model(text_config: Any, head_dim: int, ranks: int, group_size: int) -> None:
    """The layers that a dense model has, by its configuration: before weights are loaded. Raises ConfigError. Not told
    here, but by `check_shard` when the layers are there: which layers of a mixture of experts are dense, and what
    SGLang refuses, or pads on a CPU, before it shares it (heads, KV heads, inner sizes by 32)."""
    sizes = {name: getattr(text_config, name, None) for name in (*_SIZES, *_EXPERTS)}
    heads, kv_heads, inner = (size if isinstance(size := sizes[name], int) else 0 for name in _SIZES)
    if heads % ranks == 0 and kv_heads % ranks == 0:
        check_shard("o_proj", heads // ranks * head_dim, heads * head_dim, group_size)
    if inner % (_CPU_MULTIPLE * ranks) == 0 and not any(sizes[name] for name in _EXPERTS):
        check_shard("down_proj", inner // ranks, inner, group_size)
