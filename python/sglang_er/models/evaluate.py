"""What a checkpoint does on the prompt sets, by plain transformers on the CPU: accuracy, entropy, response lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_er.models import task, tokenizer


@dataclass(frozen=True)
class Sample:
    """One sampled response: its prompt, its token ids (the end token included if it came), reward, entropy in nats."""

    prompt: task.Prompt
    ids: list[int]
    finished: bool
    reward: float
    entropy_sum: float


def load_model(directory: str | Path, dtype: str = "float32") -> Any:
    """A checkpoint as a transformers causal language model in evaluation mode."""
    import torch

    from sglang_er.compat import torchvision_shim

    torchvision_shim.install()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


def sample(model: Any, prompts: Sequence[task.Prompt], seed: int = 0, max_new_tokens: int = 1900) -> list[Sample]:
    """One response to each prompt, drawn at temperature 1.

    All prompts are decoded together, and a row that ends leaves the batch. Entropy is that of every drawn position.
    """
    import torch

    encoder = tokenizer.build_tokenizer()
    ids = tokenizer.special_ids()
    encoded = [encoder.encode(tokenizer.chat_text(prompt.prompt)).ids for prompt in prompts]
    width = max(map(len, encoded))
    tokens = torch.tensor([[ids["pad"]] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = [[] for _ in prompts]
    entropy = torch.zeros(len(prompts), dtype=torch.float64)
    alive = torch.arange(len(prompts))
    cache = None
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logp = output.logits[:, -1].float().log_softmax(-1)
            entropy[alive] -= (logp.exp() * logp).sum(-1).double()
            chosen = torch.multinomial(logp.exp(), 1, generator=generator)
            for row, token in zip(alive.tolist(), chosen[:, 0].tolist(), strict=True):
                drawn[row].append(token)
            going = (chosen[:, 0] != ids["eos"]).nonzero()[:, 0]
            if len(going) == 0:
                break
            tokens = chosen
            mask = torch.cat([mask, torch.ones_like(chosen)], 1)
            if len(going) < len(alive):
                cache.batch_select_indices(going)
                tokens, mask, alive = chosen[going], mask[going], alive[going]
    texts = encoder.decode_batch(drawn, skip_special_tokens=True)
    return [
        Sample(prompt, row, row[-1] == ids["eos"], task.verify(prompt, text), float(nats))
        for prompt, row, text, nats in zip(prompts, drawn, texts, entropy, strict=True)
    ]


def summarize(samples: Sequence[Sample]) -> dict[str, float]:
    """Accuracy, entropy in nats a token, mean and longest response in tokens, and the share that ended by itself."""
    lengths = [len(one.ids) for one in samples]
    mean = sum(lengths) / len(lengths)
    return {
        "prompts": len(samples),
        "accuracy": sum(one.reward for one in samples) / len(samples),
        "entropy": sum(one.entropy_sum for one in samples) / sum(lengths),
        "mean_tokens": mean,
        "longest_tokens": max(lengths),
        "longest_over_mean": max(lengths) / mean,
        "finished": sum(one.finished for one in samples) / len(samples),
    }
