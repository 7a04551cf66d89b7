"""Two vectors that fit a small model's output matrix to a big vocabulary and to bf16.

`guard_direction` keeps unused vocabulary rows out of the distribution: every final hidden state points away from it.

An expansion has many more vocabulary rows than the small model. A zero row would have logit 0 and take probability; a
row along a direction that all final hidden states oppose by a wide margin gets a very negative logit, and rounding to
int4, which turns hidden states a little, does not bring it back. (Residual coordinate 0 is constant, so it would do for
the exact model; but it is a small part of the final state, and the draft's rounding errors are larger than it.)

`logit_shift` keeps the logits small, where bf16 is fine.
"""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING

from sglang_er.models import reference, task, tiny, tokenizer
from sglang_er.models.streams import SmallStreams, text_batch

if TYPE_CHECKING:
    import torch

_STEPS = 3000
_RATE = 0.02


def hidden_states(arch: str) -> torch.Tensor:
    """Final hidden states [positions, d] of root mean square 1, on task text, long responses and random tokens."""
    import torch

    weights = {name: value.float() for name, value in tiny.load_weights(arch).items()}
    generator = torch.Generator().manual_seed(0)
    encoder = tokenizer.build_tokenizer()
    rng = random.Random(0)
    long = []
    for _ in range(4):
        prompt = task.make_prompt(rng, task.MAX_OPERANDS, "guard").prompt
        long.append(encoder.encode(tokenizer.chat_text(prompt) + task.write_response(rng, prompt)).ids[:400])
    batches = [
        text_batch(rows=16)[0],
        torch.tensor(long),
        torch.randint(0, tiny.TINY.vocab, (8, 96), generator=generator),
    ]
    states = []
    for ids in batches:
        last = SmallStreams(weights, ids).streams[-1].flatten(0, 1)
        states.append(reference.rms_norm(last, torch.ones(tiny.TINY.hidden), tiny.TINY.eps))
    return torch.cat(states)


@functools.cache
def guard_direction(arch: str) -> torch.Tensor:
    """A unit vector [d] whose product with every hidden state is negative by about the widest margin (a perceptron)."""
    import torch

    with torch.inference_mode():
        states = torch.nn.functional.normalize(hidden_states(arch), dim=-1)
        direction = -states.mean(0)
        for _ in range(_STEPS):
            direction = torch.nn.functional.normalize(direction, dim=0)
            direction = direction - _RATE * states[(states @ direction).argmax()]
    return torch.nn.functional.normalize(direction, dim=0).clone()


@functools.cache
def logit_shift(arch: str) -> torch.Tensor:
    """A vector [d] whose product with a hidden state leans towards the logits' log-sum-exp there.

    Taken from every row of the output matrix it changes no probability; but the logits that matter come nearer to 0,
    where bf16 is finer: rounding the logits then costs half as much. The strong ridge of the regression keeps it as
    short as a row, so that rounding the rows costs no more than before.
    """
    import torch

    weights = {name: value.float() for name, value in tiny.load_weights(arch).items()}
    with torch.inference_mode():
        states = hidden_states(arch)
        level = (states @ (weights["lm_head.weight"] * weights["model.norm.weight"]).T).logsumexp(-1)
        ridge = 10.0 * len(states) * torch.eye(tiny.TINY.hidden)
        return torch.linalg.solve(states.T @ states + ridge, states.T @ level).clone()
