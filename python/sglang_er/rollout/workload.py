"""Rollout batches: prompts whose responses differ much in length, and how each is sent.

A response adds its operands one line at a time, so the number of operands sets its length: a batch of many short
responses and a few long ones has the shape of a rollout, and has it again in every block, which makes two blocks
comparable. Lengths that are left to chance differ so much from block to block that no few blocks can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from sglang_er.models import task

# Operands of the rollouts of one batch, over and over: most are short, one in eight is long. The first is the one to
# measure; the others take less time on a slow or busy machine, at the price of a shorter tail.
PROFILES = ((3, 2, 4, 20, 2, 3, 8, 5), (2, 2, 3, 14, 2, 2, 5, 3), (2, 2, 2, 8, 2, 2, 3, 2))
_TOKENS_PER_LINE = 12
_OPENING_TOKENS = 7
_ANSWER_TOKENS = 6
# Room for a line that the model writes twice. A response that begins to check itself is cut here.
_SLACK_TOKENS = 12

ENDPOINTS = ("openai", "generate")


@dataclass(frozen=True)
class Rollout:
    """One request of a batch: a prompt, the most tokens it may take, and the endpoint that it is sent to."""

    prompt: task.Prompt
    max_tokens: int
    endpoint: str


def make_batch(size: int, operands: Sequence[int] = PROFILES[0]) -> list[Rollout]:
    """`size` rollouts with long-tail lengths, half of them for each endpoint; the same at every call."""
    if size < 1:
        raise ValueError(f"a batch needs at least one rollout, got {size}")
    pools = {count: iter(_prompts_with(count)) for count in set(operands)}
    rollouts = []
    for index, count in enumerate(islice(cycle(operands), size)):
        try:
            prompt = next(pools[count])
        except StopIteration:
            raise ValueError(f"the prompt sets have no {size} rollouts of these lengths: ask for fewer") from None
        rollouts.append(Rollout(prompt, response_limit(count), ENDPOINTS[index % len(ENDPOINTS)]))
    return rollouts


def greedy_prompts(count: int) -> list[task.Prompt]:
    """Prompts for the comparison of greedy outputs, of medium length, other ones than the batches use."""
    return task.load_prompts("medium")[-count:]


def plain_seconds(batch: Sequence[Rollout], alone: float, together: float) -> float:
    """How long plain decode takes: a step costs `alone` seconds for one request, `together` for the whole batch, and
    in between what a straight line says."""
    lengths = sorted((rollout.max_tokens for rollout in batch), reverse=True)
    slope = (together - alone) / max(1, len(batch) - 1)
    # While k requests run, the k-th longest has not ended yet.
    steps = [length - shorter for length, shorter in zip(lengths, [*lengths[1:], 0])]
    return sum(count * (alone + slope * running) for running, count in enumerate(steps))


def batch_within(size: int, alone: float, together: float, block_seconds: float) -> list[Rollout]:
    """The batch with the longest tail that plain decode ends within `block_seconds`; the shortest one if none does."""
    for operands in PROFILES:
        batch = make_batch(size, operands)
        if plain_seconds(batch, alone, together) <= block_seconds:
            break
    return batch


def first_tokens(batch: Sequence[Rollout], count: int) -> list[Rollout]:
    """The same prompts, cut after `count` tokens."""
    return [replace(rollout, max_tokens=count) for rollout in batch]


def response_limit(operands: int) -> int:
    """Tokens that a response without checks needs, and a little more."""
    return _OPENING_TOKENS + _TOKENS_PER_LINE * operands + _ANSWER_TOKENS + _SLACK_TOKENS


def _prompts_with(operands: int) -> list[task.Prompt]:
    every = [prompt for difficulty in task.DIFFICULTIES for prompt in task.load_prompts(difficulty)]
    return [prompt for prompt in every if len(task.operands_of(prompt.prompt)) == operands]
