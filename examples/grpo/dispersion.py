"""Whether responses that are decoded together depend on each other: `python -m grpo.dispersion --model DIR`.

The fixed-policy test takes responses one by one; draws that the requests of a batch shared would pass it. Here the same
prompts are rolled out in many blocks, and the tokens that the task leaves free (fillers and marks) are counted block by
block. If requests shared draws, the counts would scatter more than those of blocks put together at random from the same
responses, prompt by prompt: a permutation test of the chi-square statistic over blocks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from grpo.rollout import NativeSampler, Policy, roll_out
from grpo.run import SERVER_FLAGS, draw_prompts
from grpo.settings import DRAFT, PLAIN, REMADE, Settings
from sglang_er.models import task, tokenizer
from sglang_er.rollout.client import Client
from sglang_er.rollout.launcher import choose_port, running_server
from sglang_er.rollout.progress import Progress

PERMUTATIONS = 2_000
LEAST_COUNT = 50


def dispersion_p(counts: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0) -> tuple[float, float, float]:
    """Of `counts` [blocks, prompts, samples, tokens]: the statistic, its mean under independence, and the p-value."""
    blocks, prompts, samples, tokens = counts.shape
    expected = counts.sum((0, 1, 2)) / blocks
    kept = expected * blocks > LEAST_COUNT

    def statistic(grouped: np.ndarray) -> float:
        """Of [prompts, blocks, samples, tokens]."""
        return float((((grouped.sum((0, 2)) - expected) ** 2)[:, kept] / expected[kept]).sum())

    pooled = counts.transpose(1, 0, 2, 3).reshape(prompts, blocks * samples, tokens)
    rng = np.random.default_rng(seed)
    found = statistic(pooled.reshape(prompts, blocks, samples, tokens))
    order = np.tile(np.arange(blocks * samples), (prompts, 1))
    drawn = [
        statistic(
            np.take_along_axis(pooled, rng.permuted(order, axis=1)[:, :, None], axis=1).reshape(
                prompts, blocks, samples, tokens
            )
        )
        for _ in range(permutations)
    ]
    as_large = sum(value >= found for value in drawn)
    return found, float(np.mean(drawn)), (as_large + 1) / (permutations + 1)


def measure(client: Client, blocks: int, say: Progress) -> dict[str, tuple[float, float, float]]:
    """Arm -> `dispersion_p` of its blocks, which take turns."""
    encoder = tokenizer.build_tokenizer()
    free = [encoder.encode(word).ids[0] for word in (*task.FILLERS, *task.MARKS)]
    settings = Settings()
    prompts = draw_prompts(settings, 0)
    found: dict[str, list[np.ndarray]] = {"plain": [], "speculation": []}
    for block in range(blocks):
        arms = [("plain", PLAIN), ("speculation", DRAFT)]
        for name, policy in arms if block % 2 == 0 else arms[::-1]:
            client.set_policy(policy)
            rollouts = roll_out(NativeSampler(client), prompts, settings.samples, settings.max_new_tokens)
            rows = np.array([[one.ids.count(token) for token in free] for one in rollouts], dtype=np.float64)
            found[name].append(rows.reshape(len(prompts), settings.samples, len(free)))
        say.update(f"block {block + 1} of {blocks} in either arm")
    return {name: dispersion_p(np.stack(counts)) for name, counts in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo.dispersion", description="Do requests share draws?")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint that `sglang-er make-model` wrote")
    parser.add_argument("--checkpoint", type=Path, help="weights of a run (checkpoint_NNN.safetensors) to push first")
    parser.add_argument("--blocks", type=int, default=60)
    args = parser.parse_args(argv)
    say = Progress()
    with running_server(args.model, choose_port(None), Path("dispersion.log"), SERVER_FLAGS) as server:
        if args.checkpoint:
            server.client.set_policy({**PLAIN, **REMADE})
            Policy(server.client).push(load_file(args.checkpoint).items(), args.checkpoint.stem)
        for name, (found, expected, p) in measure(server.client, args.blocks, say).items():
            say.note(f"{name}: chi-square {found:.0f}, {expected:.0f} if independent, p {p:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
