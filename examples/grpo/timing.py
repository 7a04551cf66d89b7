"""What a step costs where decode dominates: the small model is trained, its expansion to the 0.5b shape rolls out.

Every step the expansion of the trained weights is pushed as tensors, and the same prompts are rolled out plainly and
with speculation, in blocks whose order alternates; the trainer learns from one speculative block. A step's seconds in a
mode are its mean block, training, the transfer, and for speculation the requantization. Making the expansion is no part
of it: a trainer that trains the served model has nothing to expand.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from grpo import objective
from grpo.rollout import NativeSampler, Policy, Rollout, roll_out
from grpo.run import draw_prompts
from grpo.settings import PLAIN, Settings
from grpo.trainer import Trainer
from sglang_er.models import sizes
from sglang_er.models.expand import Expansion
from sglang_er.rollout.bench import switchable
from sglang_er.rollout.client import Client
from sglang_er.rollout.steps import Steps

ARCH, SHAPE = "qwen3", "0.5b"
STEPS, PAIRS = 5, 2
#: Two prompts of eight samples: what is in flight on one of many engines once a step's batch has shrunk.
TIMED = Settings(arm="speculation", steps=STEPS, prompts=2, logit_scale=1.0)
RESAMPLES = 10_000

Say = Callable[[str], None]


def measure(client: Client, trainer: Trainer, kappa: float, say: Say, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """A record a step. `client`: a server of the expansion, whose policy is the one to measure."""
    policy, drafting = Policy(client), switchable(client.state())
    records = []
    for step in range(trainer.settings.steps):
        started = time.perf_counter()
        tensors = dict(
            Expansion(ARCH, sizes.public_size(ARCH, SHAPE).shape, kappa, weights=dict(trainer.tensors())).tensors(
                torch.bfloat16
            )
        )
        expand_seconds = time.perf_counter() - started
        sync_seconds = policy.push(tensors.items(), f"step-{step}")
        tensors.clear()
        prompts = draw_prompts(trainer.settings, step)
        blocks: dict[str, list[dict[str, Any]]] = {"plain": [], "speculation": []}
        learned: list[Rollout] = []
        for pair in range(pairs):
            order = [("plain", PLAIN), ("speculation", drafting)]
            for name, wanted in order if (step + pair) % 2 == 0 else order[::-1]:
                block, rollouts = _block(client, wanted, prompts, trainer.settings)
                blocks[name].append(block)
                learned = rollouts if name == "speculation" else learned
                say(f"step {step + 1}: {name} {block['seconds']:.1f} s, {block['tokens']} tokens")
        rewards = torch.tensor([one.reward for one in learned]).view(len(prompts), -1)
        started = time.perf_counter()
        trainer.step(learned, objective.group_advantages(rewards).flatten())
        train_seconds = time.perf_counter() - started
        records.append(
            {
                "step": step,
                "reward": float(rewards.mean()),
                "blocks": blocks,
                "train_seconds": train_seconds,
                "sync_seconds": sync_seconds,
                "expand_seconds": expand_seconds,
            }
        )
    client.set_policy(drafting)
    return records


def _block(
    client: Client, policy: Mapping[str, Any], prompts: Sequence[Any], settings: Settings
) -> tuple[dict[str, Any], list[Rollout]]:
    client.set_policy(policy)
    client.flush_cache()
    before = client.state()
    started = time.perf_counter()
    rollouts = roll_out(NativeSampler(client), prompts, settings.samples, settings.max_new_tokens)
    seconds = time.perf_counter() - started
    client.set_policy(policy)
    after = client.state()
    steps = Steps.total(after).since(Steps.total(before))
    requantize = after["twin"]["requantize_seconds"] - before["twin"]["requantize_seconds"]
    return {
        "seconds": seconds - requantize,
        "requantize_seconds": requantize,
        "tokens": sum(len(one.ids) for one in rollouts),
        "longest": max(len(one.ids) for one in rollouts),
        "accept_length": steps.accept_length,
        "alpha": steps.alpha,
        "steps_by_gamma": steps.steps_by_gamma,
    }, rollouts


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals per mode over all steps, and speculation over plain with a bootstrap interval over blocks."""
    modes = {
        mode: [block for record in records for block in record["blocks"][mode]] for mode in ("plain", "speculation")
    }
    fixed = statistics.fmean(record["train_seconds"] + record["sync_seconds"] for record in records)
    requantize = sum(block["requantize_seconds"] for block in modes["speculation"]) / len(records)
    rng = random.Random(0)

    def ratios(plain: Sequence[Mapping[str, Any]], drafted: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
        """Rollout seconds, step seconds, and seconds per token: speculation over plain."""
        ours, theirs = (statistics.fmean(block["seconds"] for block in blocks) for blocks in (drafted, plain))
        tokens = sum(block["tokens"] for block in drafted) / sum(block["tokens"] for block in plain)
        return ours / theirs, (ours + requantize + fixed) / (theirs + fixed), ours / theirs / tokens

    found = ratios(modes["plain"], modes["speculation"])
    resampled = [ratios(*(rng.choices(blocks, k=len(blocks)) for blocks in modes.values())) for _ in range(RESAMPLES)]
    cut = RESAMPLES // 40
    return {
        "mean_seconds": {
            **{f"rollout, {mode}": statistics.fmean(block["seconds"] for block in modes[mode]) for mode in modes},
            "training and transfer": fixed,
            "requantization": requantize,
            "expansion (not part of a step)": statistics.fmean(record["expand_seconds"] for record in records),
        },
        "tokens": {mode: sum(block["tokens"] for block in modes[mode]) for mode in modes},
        "accept_length": statistics.fmean(block["accept_length"] or 1.0 for block in modes["speculation"]),
        "ratio": {
            name: {"value": found[i], "low": column[cut], "high": column[-1 - cut]}
            for i, name in enumerate(("rollout seconds", "step seconds", "seconds per token"))
            for column in [sorted(row[i] for row in resampled)]
        },
    }
