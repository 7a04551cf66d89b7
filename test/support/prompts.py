"""Random token-id prompts for the flat models. Text would do as well; ids make lengths exact."""

from __future__ import annotations

import random

# Ids below the tokenizer's special tokens.
PLAIN_IDS = 300


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(PLAIN_IDS) for _ in range(length)]


def mixed_prompts(count: int, seed: int, shortest: int = 3, longest: int = 200) -> list[list[int]]:
    """`count` prompts whose lengths are spread evenly over shortest..longest, in random order."""
    rng = random.Random(seed)
    lengths = [shortest + (longest - shortest) * i // max(1, count - 1) for i in range(count)]
    rng.shuffle(lengths)
    return [random_prompt(rng, length) for length in lengths]
