"""What a run is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

PLAIN: Mapping[str, Any] = MappingProxyType({"policy": "fixed", "gamma": 0})
#: One draft length for a whole run: then accept lengths can be compared over its steps.
DRAFT: Mapping[str, Any] = MappingProxyType({"policy": "fixed", "gamma": 4})
REMADE: Mapping[str, Any] = MappingProxyType({"requantize": True, "weight_check_seconds": 10.0, "health_drop": 0.5})
#: The twin stays as it is, whatever happens to the policy; nothing that would notice it may act.
FROZEN: Mapping[str, Any] = MappingProxyType({"requantize": False, "weight_check_seconds": 0.0, "health_drop": 0.0})

#: Arm -> what it asks of the server (POST /er/policy).
ARMS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "plain": {**PLAIN, **REMADE},
        "speculation": {**DRAFT, **REMADE},
        "frozen": {**DRAFT, **FROZEN},
    }
)


@dataclass(frozen=True)
class Settings:
    """One run. `operands`: of the prompts, inclusive.

    `logit_scale`: the run starts from the trained model with its logits scaled by this. It is surer of the task than
    GRPO could make it in minutes; softened it errs, and has something to learn.
    Each step draws `prompts` fresh prompts, `samples` responses to each, and makes `minibatches` optimizer steps.
    `clip`: the range of the probability ratio is [1 - clip[0], 1 + clip[1]].
    """

    arm: str = "speculation"
    seed: int = 0
    steps: int = 30
    prompts: int = 16
    samples: int = 8
    operands: tuple[int, int] = (2, 5)
    logit_scale: float = 0.6
    max_new_tokens: int = 480
    learning_rate: float = 4e-4
    minibatches: int = 2
    clip: tuple[float, float] = (0.2, 0.28)
    max_gradient: float = 1.0
    client: str = "native"

    def __post_init__(self) -> None:
        for name, value, known in (("arm", self.arm, tuple(ARMS)), ("client", self.client, ("native", "openai"))):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
        for name in ("steps", "prompts", "max_new_tokens", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2: an advantage compares them, got {self.samples}")
