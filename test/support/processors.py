"""A custom logit processor for requests; in an importable module, because requests carry it by reference."""

from __future__ import annotations

from typing import Any

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class ForbidEven(CustomLogitProcessor):
    """Only odd token ids may follow: a rule that shows in the output."""

    def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
        logits[:, ::2] = float("-inf")
        return logits
