"""Requests of an exact size: so many prompt tokens, so many response tokens.

A model of this project gets the text of its task, so that acceptance is what its card states: the prompt ends within a
response that has begun to check itself, after which the model tends to check again and again and so goes on for
hundreds of tokens. Any other model gets random token ids.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_er.models import task, tokenizer

# Every tokenizer in use has at least these: single bytes, mostly.
_PLAIN_IDS = range(3, 256)
# Tokens of a prompt with its frame, per operand and fixed, and of one pass over it; measured on `task`'s text.
_FRAME_TOKENS, _TOKENS_PER_OPERAND = 40, 18


@dataclass(frozen=True)
class Request:
    """One request: its prompt's token ids and the exact number of tokens to generate."""

    input_ids: tuple[int, ...]
    output_tokens: int

    def sampling(self, temperature: float) -> dict[str, Any]:
        return {"temperature": temperature, "max_new_tokens": self.output_tokens, "ignore_eos": True}


def knows_the_task(card: Mapping[str, Any]) -> bool:
    """True for the model card of a checkpoint that was trained, or made from one that was."""
    return card.get("shape") not in (None, "flat")


def make_requests(outputs: Sequence[int], input_tokens: int, task_text: bool, seed: int) -> list[Request]:
    """One request per output length; different prompts, the same at every call."""
    rng = random.Random(f"prompts/{seed}")
    encoder = tokenizer.build_tokenizer() if task_text else None
    return [
        Request(tuple(_random_ids(rng, input_tokens) if encoder is None else _task_ids(rng, input_tokens, encoder)), n)
        for n in outputs
    ]


def _random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.choice(_PLAIN_IDS) for _ in range(count)]


def _task_ids(rng: random.Random, count: int, encoder: Any) -> list[int]:
    """The first `count` ids of a prompt and an endless response; the last ones where the prompt alone is longer."""
    operands = min(max(2, (count - _FRAME_TOKENS) // _TOKENS_PER_OPERAND), 16)
    prompt = task.make_prompt(rng, operands, "bench").prompt
    head: list[int] = encoder.encode(tokenizer.chat_text(prompt)).ids
    if len(head) >= count:
        return head[-count:]
    ids = list(head)
    while len(ids) < count:
        text = task.write_response(rng, prompt).rpartition("=")[0] + "check\n"
        ids += encoder.encode(text).ids
    return ids[:count]
