"""Greedy outputs with and without speculation, token by token; where they part, how near to a tie that was.

In fp32 they are equal (the tests prove it). In bf16 the plain pass and the verify pass multiply matrices of different
heights, round differently, and may take different sides where two tokens are nearly equally likely. From there on the
texts differ, so only the first difference says anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglang_er.models import task, tokenizer
from sglang_er.rollout.client import Client, Response
from sglang_er.rollout.measure import PLAIN, send_all

# bf16 logits near 20 are 1/8 apart: tokens within a few such steps can change places by rounding alone.
NEAR_TIE_NATS = 0.5
_TOP = 5


@dataclass(frozen=True)
class Difference:
    """First difference of two greedy outputs. `gap`: nats by which the plain pass preferred its own token to the other
    one; None if the other was not among its most likely ones."""

    position: int
    gap: float | None

    @property
    def explained(self) -> bool:
        return self.gap is not None and self.gap <= NEAR_TIE_NATS


@dataclass(frozen=True)
class Equality:
    """`differences[i]` belongs to the i-th prompt, None where the outputs are equal."""

    differences: list[Difference | None]
    tokens: int

    @property
    def equal(self) -> int:
        return sum(difference is None for difference in self.differences)

    @property
    def wrong(self) -> int:
        """Outputs that differ by more than a near tie."""
        return sum(difference is not None and not difference.explained for difference in self.differences)

    @property
    def largest_gap(self) -> float | None:
        gaps = [d.gap for d in self.differences if d is not None and d.gap is not None]
        return max(gaps, default=None)


def first_difference(plain: Response, other: Response) -> Difference | None:
    """None where both have the same tokens to the end."""
    for position, (mine, theirs) in enumerate(zip(plain.ids, other.ids, strict=False)):
        if mine != theirs:
            top = plain.top[position] if position < len(plain.top) else {}
            gap = plain.logprobs[position] - top[theirs] if theirs in top else None
            return Difference(position, gap)
    if len(plain.ids) != len(other.ids):
        return Difference(min(len(plain.ids), len(other.ids)), None)
    return None


def compare_greedy(
    client: Client,
    policy: Mapping[str, Any],
    prompts: Sequence[task.Prompt],
    max_tokens: int,
    on_progress: Callable[[str], None],
) -> Equality:
    """All prompts at once under each policy, so that the batches are alike."""
    sampling = {"temperature": 0.0, "max_new_tokens": max_tokens}
    jobs = [
        partial(client.generate, tokenizer.chat_text(prompt.prompt), sampling, top_logprobs=_TOP) for prompt in prompts
    ]
    outputs: list[list[Response]] = []
    for name, changes in (("plain", PLAIN), ("speculative", policy)):
        client.set_policy(changes)
        outputs.append(send_all(jobs, partial(_tell, on_progress, name)))
    return Equality(
        [first_difference(plain, other) for plain, other in zip(*outputs, strict=True)],
        sum(len(plain.ids) for plain in outputs[0]),
    )


def _tell(on_progress: Callable[[str], None], name: str, done: int, total: int, seconds: float) -> None:
    on_progress(f"{name}, {done}/{total} responses, {seconds:.0f} s")
