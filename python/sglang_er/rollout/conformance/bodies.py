"""Requests as slime and AReaL send them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def slime(prompt: Sequence[int], tokens: int, **changes: Any) -> dict[str, Any]:
    """slime's rollout request; `changes` to its sampling parameters."""
    sampling = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": tokens,
        "stop": None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    return {"input_ids": list(prompt), "sampling_params": {**sampling, **changes}, "return_logprob": True}


def areal(prompt: Sequence[int], tokens: int, **changes: Any) -> dict[str, Any]:
    """AReaL's generation request; `changes` to its sampling parameters."""
    sampling = {
        "top_p": 1.0,
        "top_k": 100_000_000,
        "max_new_tokens": tokens,
        "temperature": 1.0,
        "stop_token_ids": [],
        "ignore_eos": False,
        "skip_special_tokens": True,
        "frequency_penalty": 0.0,
    }
    return {
        "input_ids": list(prompt),
        "image_data": [],
        "sampling_params": {**sampling, **changes},
        "return_logprob": True,
        "stream": False,
    }


def greedy(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """AReaL's request for the most likely tokens, exactly `tokens` of them."""
    return areal(prompt, tokens, temperature=0.0, ignore_eos=True)


def scoring(sequence: Sequence[int], start: int = 0) -> dict[str, Any]:
    """slime's request to a teacher: the logprobs of `sequence` from position `start` on, no token generated."""
    sampling = {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False}
    return {
        "input_ids": list(sequence),
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": start,
    }
