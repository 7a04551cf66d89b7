"""Rollout batches: prompts whose responses differ much in length, and how each is sent.

A response adds its operands one line at a time, so the number of operands sets its length: a batch of many short
responses and a few long ones has the shape of a rollout, and has it again in every block, which makes two blocks
comparable. Lengths that are left to chance differ so much from block to block that no few blocks can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice

from sglang_er.models import task

# Operands of the rollouts of one batch, over and over: most are short, one in eight is long.
OPERANDS = (3, 2, 4, 16, 2, 3, 8, 5)
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


def make_batch(size: int) -> list[Rollout]:
    """`size` rollouts with long-tail lengths, half of them for each endpoint; the same at every call."""
    if size < 1:
        raise ValueError(f"a batch needs at least one rollout, got {size}")
    pools = {count: iter(_prompts_with(count)) for count in set(OPERANDS)}
    rollouts = []
    for index, count in enumerate(islice(cycle(OPERANDS), size)):
        try:
            prompt = next(pools[count])
        except StopIteration:
            raise ValueError(f"the prompt sets have no {size} rollouts of these lengths: ask for fewer") from None
        rollouts.append(Rollout(prompt, response_limit(count), ENDPOINTS[index % len(ENDPOINTS)]))
    return rollouts


def greedy_prompts(count: int) -> list[task.Prompt]:
    """Prompts for the comparison of greedy outputs, of medium length; none of them is in a batch."""
    used = {rollout.prompt.prompt for rollout in make_batch(len(OPERANDS))}
    return [prompt for prompt in task.load_prompts("medium") if prompt.prompt not in used][:count]


def response_limit(operands: int) -> int:
    """Tokens that a response without checks needs, and a little more."""
    return _OPENING_TOKENS + _TOKENS_PER_LINE * operands + _ANSWER_TOKENS + _SLACK_TOKENS


def _prompts_with(operands: int) -> list[task.Prompt]:
    every = [prompt for difficulty in task.DIFFICULTIES for prompt in task.load_prompts(difficulty)]
    return [prompt for prompt in every if len(task.operands_of(prompt.prompt)) == operands]
