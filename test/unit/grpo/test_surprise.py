"""Exact samples pass; samples of a slightly sharper policy, and siblings that share draws, are seen."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from grpo.rollout import Rollout
from grpo.surprise import Surprise, add

VOCABULARY, LENGTH, SAMPLES = 12, 40, 8


class Bigrams(torch.nn.Module):
    """The next token depends on the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = 2.0 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
        self.lm_head = torch.nn.Identity()

    def model(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.logits[input_ids])


def sampled(prompts: int, temperature: float = 1.0, shared: bool = False, seed: int = 1) -> Surprise:
    model, found = Bigrams(), Surprise()
    generator = torch.Generator().manual_seed(seed)
    p = (model.logits / temperature).softmax(-1)
    last = torch.zeros(prompts * SAMPLES, dtype=torch.int64)
    ids = []
    for _ in range(LENGTH):
        coins = torch.rand(prompts * SAMPLES, generator=generator)
        if shared:
            coins = coins[::SAMPLES].repeat_interleave(SAMPLES)
        last = (p[last].cumsum(-1) < coins[:, None]).sum(-1).clamp(max=VOCABULARY - 1)
        ids.append(last)
    rows = torch.stack(ids, dim=1).tolist()
    add(found, model, [Rollout((0,), tuple(row), (0.0,) * LENGTH, 0.0, True) for row in rows], SAMPLES)
    return found


def z(found: Surprise) -> float:
    return found.excess / math.sqrt(found.variance)


def test_exact_samples_are_as_surprising_as_they_should_be():
    found = sampled(200)
    assert found.tokens == 200 * SAMPLES * LENGTH
    assert abs(z(found)) < 3
    assert abs(found.alike / found.expected - 1) < 0.05


def test_a_policy_that_is_two_percent_sharper_is_seen():
    assert z(sampled(200, temperature=0.98)) < -3.5


def test_siblings_that_share_draws_are_seen():
    found = sampled(60, shared=True)
    assert abs(z(found)) < 6  # the tokens themselves are fair
    assert found.alike > 2 * found.expected
    assert "independent" in str(found)
