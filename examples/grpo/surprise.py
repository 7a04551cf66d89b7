"""Whether sampled tokens are as surprising as their distribution says: `python -m grpo.surprise --model DIR`.

At every token x = -log p(token) - H(p) has mean 0 under exact sampling and variance Var(log p), whatever was sampled
before: the sums are a martingale. p is the trainer's, in fp32 from the weights that were pushed. A sampler that prefers
likely tokens, be it by a hundredth of the entropy, shows after some hundred thousand tokens; whole responses, as the
fixed-policy test compares them, would need a hundred times as many.

Requests that shared draws would pass that: so the responses to one prompt are compared in pairs as long as they are
alike. That both take the same token has probability sum p^2.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from safetensors.torch import load_file

from grpo.rollout import NativeSampler, Policy, Rollout, roll_out
from grpo.run import SERVER_FLAGS, draw_prompts
from grpo.settings import DRAFT, PLAIN, REMADE, Settings
from grpo.trainer import micro_batches, padded
from sglang_er.models.evaluate import load_model
from sglang_er.rollout.launcher import choose_port, running_server
from sglang_er.rollout.progress import Progress

ARMS = {"plain": PLAIN, "speculation": DRAFT}


@dataclass
class Surprise:
    """Sums over tokens: x, its variance, the entropy (nats); over pairs: agreements, expected ones."""

    tokens: int = 0
    excess: float = 0.0
    variance: float = 0.0
    entropy: float = 0.0
    pairs: int = 0
    alike: float = 0.0
    expected: float = 0.0

    def __str__(self) -> str:
        mean, spread = self.excess / self.tokens, math.sqrt(self.variance) / self.tokens
        return (
            f"{self.tokens} tokens, entropy {self.entropy / self.tokens:.4f}, excess {mean:+.5f} +- {spread:.5f} (z "
            f"{mean / spread:+.2f}); pairs alike {self.alike:.0f} of {self.pairs}, {self.expected:.0f} if independent"
        )


@torch.no_grad()
def scored(model: torch.nn.Module, rollouts: Sequence[Rollout]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(index, log p of the response's tokens [N], log p of all tokens [N, V]) of each rollout."""
    for indices in micro_batches(rollouts, range(len(rollouts))):
        batch = [rollouts[index] for index in indices]
        ids, wanted = padded(batch)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][wanted]
        logp = model.lm_head(hidden).float().log_softmax(-1)
        chosen = logp.gather(1, ids[:, 1:][wanted][:, None]).squeeze(1)
        counts = [len(one.ids) for one in batch]
        yield from zip(indices, chosen.split(counts), logp.split(counts))


def add(found: Surprise, model: torch.nn.Module, rollouts: Sequence[Rollout], samples: int) -> None:
    """Count a block: `samples` responses to each prompt, prompt by prompt."""
    agreement: dict[int, torch.Tensor] = {}
    for index, chosen, logp in scored(model, rollouts):
        p = logp.exp()
        entropy = -(p * logp).sum(-1)
        found.tokens += len(chosen)
        found.entropy += float(entropy.sum())
        found.excess += float((-chosen - entropy).sum())
        found.variance += float(((p * logp * logp).sum(-1) - entropy**2).sum())
        agreement[index] = (p * p).sum(-1)
    for group in range(0, len(rollouts), samples):
        for one, other in combinations(range(group, group + samples), 2):
            alike = _shared(rollouts[one].ids, rollouts[other].ids)
            seen = min(alike + 1, len(rollouts[one].ids), len(rollouts[other].ids))
            found.pairs += seen
            found.alike += alike
            found.expected += float(agreement[one][:seen].sum())


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens until the two differ."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grpo.surprise", description="Are samples as likely as they should be?"
    )
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint that `sglang-er make-model` wrote")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of a run, checkpoint_NNN.safetensors")
    parser.add_argument("--blocks", type=int, default=100, help="of 128 responses, in either arm (%(default)s)")
    args = parser.parse_args(argv)
    say, weights = Progress(), load_file(args.checkpoint)
    model = load_model(args.model)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    found = {name: Surprise() for name in ARMS}
    with running_server(args.model, choose_port(None), Path("surprise.log"), SERVER_FLAGS) as server:
        server.client.set_policy({**PLAIN, **REMADE})
        Policy(server.client).push(weights.items(), args.checkpoint.stem)
        for block in range(args.blocks):
            settings = Settings(seed=1000 + block)
            prompts = draw_prompts(settings, 0)
            for name in list(ARMS)[:: 1 if block % 2 else -1]:
                server.client.set_policy(ARMS[name])
                rollouts = roll_out(NativeSampler(server.client), prompts, settings.samples, settings.max_new_tokens)
                add(found[name], model, rollouts, settings.samples)
            say.update(f"block {block + 1} of {args.blocks} in either arm")
    for name, one in found.items():
        say.note(f"{name}: {one}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
