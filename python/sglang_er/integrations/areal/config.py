"""AReaL's config with our options: the `sglang` section gets `er`, `er_plain`, `er_flags` and `er_python`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from areal.api.cli_args import GRPOConfig, SGLangConfig

from sglang_er import config
from sglang_er.config import ConfigError

#: AReaL has a field for these, the SGLang that we serve with has no flag.
GONE = ("cuda_graph_bs", "cuda_graph_max_bs", "enable_ep_moe", "enable_nan_detection", "torchao_config")


@dataclass
class ERSGLangConfig(SGLangConfig):
    """AReaL's options of its SGLang servers, and ours."""

    er: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of sglang-er (docs/configuration.md), as in its file."}
    )
    er_plain: bool = field(
        default=False, metadata={"help": "No speculation, everything else the same: the fair baseline."}
    )
    er_flags: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Flags of SGLang that have no field here, underscores for dashes. They win over the fields."},
    )
    er_python: str | None = field(
        default=None,
        metadata={"help": "Python of the environment with sglang-er and its SGLang, where AReaL's own has another."},
    )

    def __post_init__(self) -> None:
        mistakes = [
            f"sglang.{name}: the SGLang of sglang-er has no such flag; leave it out, or give its successor in er_flags"
            for name in GONE
            if getattr(self, name, None)
        ]
        try:
            # Options of one file are judged together; the server adds those of its own environment.
            config.resolve(flags=self.er)
        except ConfigError as error:
            mistakes += [f"sglang.er: {line}" for line in str(error).splitlines()]
        if mistakes:
            raise ConfigError("\n".join(mistakes))


@dataclass
class ERGRPOConfig(GRPOConfig):
    """AReaL's experiment with our `sglang` section. What the server would refuse after minutes is refused here."""

    sglang: ERSGLangConfig = field(default_factory=ERSGLangConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout._version != "v1":
            raise ConfigError("rollout._version: v2 starts servers past the backend; use v1, or docs/areal.md, way 2")
        if self.actor.use_lora and not self.sglang.er_plain:
            raise ConfigError(
                "actor.use_lora: SGLang has no LoRA with this speculation; set sglang.er_plain or leave it"
            )
