"""A trainer of a few lines: one clipped policy-gradient step per round, on one device, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

with contextlib.suppress(ImportError):
    # Only for environments whose torchvision does not fit their torch; does nothing elsewhere.
    from sglang_er.compat import torchvision_shim

    torchvision_shim.install()

from transformers import AutoModelForCausalLM

CLIP = 0.2


class Trainer:
    """The policy, its optimizer, and checkpoints in the precision that it came in."""

    def __init__(self, checkpoint: Path, lr: float) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
        self.dtype: torch.dtype = self.model.config.dtype
        self.model.float()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)

    def step(self, samples: Sequence[Any], advantages: Sequence[float], temperature: float) -> float:
        """One update from `samples`. Returns the mean distance of our logprobs from those that came with them."""
        tokens = sum(len(sample.response_ids) for sample in samples)
        gap = 0.0
        self.optimizer.zero_grad()
        for sample, advantage in zip(samples, advantages):
            behaviour = torch.tensor(sample.logprobs)
            now = self.logprobs(sample.prompt_ids, sample.response_ids, temperature)
            gap += (now.detach() - behaviour).abs().sum().item()
            ratio = (now - behaviour).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            (-gain.sum() / tokens).backward()
        self.optimizer.step()
        return gap / tokens

    def logprobs(self, prompt: Sequence[int], response: Sequence[int], temperature: float) -> torch.Tensor:
        """Of each response token, at `temperature`."""
        logits = self.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(response)[:, None]
        return torch.log_softmax(logits / temperature, dim=-1).gather(1, chosen)[:, 0]

    def save(self, folder: Path) -> Path:
        weights = {name: value.to(self.dtype) for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights)
        return folder
