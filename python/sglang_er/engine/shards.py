"""Whether ranks that share a layer's inputs have whole groups of them."""

from __future__ import annotations

from typing import Any

from sglang_er.config import ConfigError


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
    """The layers that a dense model has, by its configuration: before weights are loaded. Which layers of a mixture of
    experts are dense is seen when they are there. Raises ConfigError."""
    heads, inner = getattr(text_config, "num_attention_heads", 0), getattr(text_config, "intermediate_size", 0) or 0
    if getattr(text_config, "moe_intermediate_size", None) or getattr(text_config, "num_local_experts", None):
        inner = 0
    for name, parts, size in (("o_proj", heads, head_dim), ("down_proj", inner, 1)):
        if parts % ranks == 0:  # SGLang says what else does not fit
            check_shard(name, parts // ranks * size, parts * size, group_size)
