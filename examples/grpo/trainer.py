"""The trainer's side: the small model in fp32 on the CPU, its optimizer, and one GRPO step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo import objective
from grpo.rollout import Rollout
from grpo.settings import Settings
from sglang_er.models import tiny
from sglang_er.models.evaluate import load_model

#: Padded tokens of one forward and backward pass.
MICRO_BATCH_TOKENS = 6144


@dataclass
class _Seen:
    """What the untouched policy says of tokens that the server sampled, collected in the first optimizer step.

    Tensors [N] per batch: the server's logprob, the trainer's, and the entropy of the distribution, in nats.
    """

    sampled: list[torch.Tensor] = field(default_factory=list)
    own: list[torch.Tensor] = field(default_factory=list)
    entropy: list[torch.Tensor] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        sampled, own = torch.cat(self.sampled), torch.cat(self.own)
        return {
            "entropy": float(torch.cat(self.entropy).mean()),
            "kl": objective.kl_estimate(sampled, own),
            "largest_logprob_difference": float((sampled - own).abs().max()),
        }


class Trainer:
    """Holds fp32 weights and Adam's moments; the server gets bf16 copies."""

    def __init__(self, checkpoint: Path, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.model: Any = load_model(checkpoint)
        with torch.no_grad():
            self.model.lm_head.weight.mul_(settings.logit_scale)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, rollouts: Sequence[Rollout], advantages: torch.Tensor) -> dict[str, float]:
        """One optimizer step per part of `rollouts`, with `advantages` [len(rollouts)]; what was seen in them.

        Entropy and KL are those of the first part, a random one, before the policy changed.
        """
        order = torch.randperm(len(rollouts)).tolist()
        parts = [order[first :: self.settings.minibatches] for first in range(self.settings.minibatches)]
        seen = _Seen()
        norms, clipped, tokens = [], 0, 0
        for number, part in enumerate(parts):
            norm, bound, count = self._update(rollouts, part, advantages, seen if number == 0 else None)
            norms.append(norm)
            clipped += bound
            tokens += count
        return seen.metrics() | {"gradient_norm": sum(norms) / len(norms), "clipped": clipped / max(1, tokens)}

    @torch.no_grad()
    def logprobs(self, rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all response tokens [N], in no particular order: the server's logprobs and the trainer's."""
        seen = _Seen()
        for indices in micro_batches(rollouts, range(len(rollouts))):
            self._forward([rollouts[index] for index in indices], seen)
        return torch.cat(seen.sampled), torch.cat(seen.own)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The weights as the server takes them: bf16, by Hugging Face name."""
        return [(name, value.detach().bfloat16().contiguous()) for name, value in self.model.state_dict().items()]

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])

    def _update(
        self, rollouts: Sequence[Rollout], part: Sequence[int], advantages: torch.Tensor, seen: _Seen | None
    ) -> tuple[float, int, int]:
        """One optimizer step: gradient norm, clipped tokens, tokens that it learned from."""
        # A group whose samples all got the same reward has advantage 0: nothing to learn from it.
        useful = [index for index in part if float(advantages[index]) != 0.0]
        total = sum(len(rollouts[index].ids) for index in useful)
        clipped = 0
        self.optimizer.zero_grad(set_to_none=True)
        for indices in micro_batches(rollouts, useful):
            batch = [rollouts[index] for index in indices]
            logprobs = self._forward(batch, seen)
            weights = torch.cat([advantages[index].expand(len(rollouts[index].ids)) for index in indices])
            loss, bound = objective.clipped_loss(logprobs, _sampled(batch), weights.float(), self.settings.clip)
            (loss.sum() / total).backward()
            clipped += int(bound.sum())
        if seen is not None:
            with torch.no_grad():
                for indices in micro_batches(rollouts, sorted(set(part) - set(useful))):
                    self._forward([rollouts[index] for index in indices], seen)
        if not useful:
            return 0.0, 0, 0
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient)
        self.optimizer.step()
        tiny.freeze_constant(self.model)
        return float(norm), clipped, total

    def _forward(self, batch: Sequence[Rollout], seen: _Seen | None) -> torch.Tensor:
        """Logprobs [N] of the response tokens of a padded batch, rollout after rollout; adds to `seen`."""
        ids, wanted = padded(batch)
        # Padded on the right and causal: no row sees its padding, so no mask is needed.
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][wanted]
        logp = self.model.lm_head(hidden).float().log_softmax(-1)
        chosen = logp.gather(1, ids[:, 1:][wanted][:, None]).squeeze(1)
        if seen is not None:
            seen.sampled.append(_sampled(batch))
            seen.own.append(chosen.detach())
            seen.entropy.append(-(logp.detach().exp() * logp.detach()).sum(-1))
        return chosen


def padded(batch: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [rows, width], padded on the right, and a mask [rows, width - 1] of what comes before each response
    token: the hidden states there give its distribution."""
    width = max(len(one.prompt_ids) + len(one.ids) for one in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    wanted = torch.zeros(len(batch), width - 1, dtype=torch.bool)
    for row, one in enumerate(batch):
        start, stop = len(one.prompt_ids), len(one.prompt_ids) + len(one.ids)
        ids[row, :stop] = torch.tensor(one.prompt_ids + one.ids)
        wanted[row, start - 1 : stop - 1] = True
    return ids, wanted


def _sampled(batch: Sequence[Rollout]) -> torch.Tensor:
    """The logprobs [N] that came with the responses."""
    return torch.cat([torch.tensor(one.logprobs) for one in batch])


def micro_batches(rollouts: Sequence[Rollout], indices: Sequence[int]) -> Iterator[list[int]]:
    """Indices in groups of like length, so that little of a batch is padding."""
    held: list[int] = []
    for index in sorted(indices, key=lambda i: -len(rollouts[i].prompt_ids) - len(rollouts[i].ids)):
        longest = rollouts[held[0]] if held else rollouts[index]
        if held and (len(held) + 1) * (len(longest.prompt_ids) + len(longest.ids)) > MICRO_BATCH_TOKENS:
            yield held
            held = []
        held.append(index)
    if held:
        yield held
