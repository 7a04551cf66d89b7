"""Options for trainers (docs/weight_sync.md, docs/provenance.md); `config.py` merges and judges them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, field_validator

from sglang_er.config_messages import FORMS

Part = Literal["sessions", "spec_keys", "weight_version", "memory", "guard", "all", "none"]
PARTS: tuple[Part, ...] = ("sessions", "spec_keys", "weight_version", "memory", "guard")

# What can change while a server lives.
SYNC_SWITCHABLE = frozenset(
    {"requantize", "requantize_on_continue", "weight_check_seconds", "check_epochs", "health_drop", "rl_compat"}
    | {"provenance"}
)


class SyncOptions(BaseModel):
    """The fields that keep the twin with the policy, suit RL frameworks, and tell trainers about tokens."""

    requantize: bool = Field(
        True, description="remake the 4-bit twin after weight updates; false only to show what a stale twin costs"
    )
    requantize_on_continue: bool = Field(
        True,
        description="take the twin for stale at every continue_generation: a trainer may have written the parameters "
        "without an update call",
    )
    weight_check_seconds: float = Field(
        10.0,
        ge=0.0,
        le=86400.0,
        description="how often a few rows of every weight are compared with what the twin was made from; 0 for never",
    )
    check_epochs: bool = Field(
        False, description="stop the server if a draft pass ever begins with a twin of another weight epoch"
    )
    health_drop: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="share of the accepted drafts whose loss right after a weight update turns speculation off; 0 for "
        "never",
    )
    rl_compat: tuple[Part, ...] = Field(
        PARTS, description="what RL frameworks expect and stock SGLang lacks, any of these, all or none"
    )

    provenance: Literal["off", "request", "all"] = Field(
        "off",
        description="whether meta_info says of every token how it came about, the twin's logprob and the policy's "
        "version: never, for requests that ask, or for all",
    )

    @field_validator("rl_compat", mode="before")
    @classmethod
    def _parts_from_text(cls, value: object) -> object:
        """Environment and flags are text: `sessions,memory`, `all`, `none`."""
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("rl_compat")
    @classmethod
    def _whole_or_parts(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        if not value or (len(value) > 1 and {"all", "none"} & set(value)):
            raise ValueError(FORMS["rl_compat"])
        return PARTS if value == ("all",) else value
