"""Task text as token ids, and the small model's residual stream on it: what the measurements start from."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from sglang_er.models import reference, task, tokenizer
from sglang_er.models.tiny import TINY

if TYPE_CHECKING:
    import torch

_TEXT_SEED = 20260


def text_batch(rows: int = 8, length: int = 136, seed: int = _TEXT_SEED) -> tuple[torch.Tensor, torch.Tensor]:
    """Task text (token ids [rows, length], mask of the positions whose next token is the response's)."""
    import torch

    encoder = tokenizer.build_tokenizer()
    rng = random.Random(seed)
    ids, kept = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.bool)
    row = 0
    while row < rows:
        prompt = task.make_prompt(rng, rng.randint(5, 6), "measure")
        head = encoder.encode(tokenizer.chat_text(prompt.prompt)).ids
        whole = head + encoder.encode(task.write_response(rng, prompt.prompt) + tokenizer.EOS).ids
        if len(whole) <= length:
            ids[row, : len(whole)] = torch.tensor(whole)
            kept[row, len(head) - 1 : len(whole) - 1] = True
            row += 1
    return ids, kept


class SmallStreams:
    """The small model run on token ids [rows, length].

    `streams`: its residual stream [rows, length, d] before each layer and after the last; `logp`: log probabilities.
    """

    def __init__(self, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> None:
        self.streams = [weights["model.embed_tokens.weight"][ids]]
        for index in range(TINY.layers):
            self.streams.append(reference.layer_forward(layer_of(weights, index), self.streams[-1], TINY))
        final = reference.rms_norm(self.streams[-1], weights["model.norm.weight"], TINY.eps)
        self.logp = (final @ weights["lm_head.weight"].T).log_softmax(-1)


def layer_of(weights: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """The tensors of layer `index`, without the layer's prefix."""
    prefix = f"model.layers.{index}."
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
