"""The arithmetic of GRPO against hand-made numbers, autograd and sampling."""

from __future__ import annotations

import pytest
import torch
from grpo.objective import clipped_loss, group_advantages, kl_estimate


def test_advantages_compare_the_samples_of_a_prompt():
    found = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]]))
    assert torch.allclose(found[0], torch.tensor([1.0, -1.0, -1.0, 1.0]), atol=1e-4)
    assert torch.equal(found[1], torch.zeros(4))
    # Standard deviation of (0, 0, 0, 1): sqrt(3) / 4.
    assert torch.allclose(found[2], torch.tensor([-1.0, -1.0, -1.0, 3.0]) / 3**0.5, atol=1e-4)


def test_on_policy_the_gradient_is_that_of_reinforce():
    logprobs = torch.tensor([-0.5, -1.5, -0.1], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    loss, bound = clipped_loss(logprobs, logprobs.detach(), advantages, (0.2, 0.28))
    loss.sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)
    assert not bound.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.29, 1.0, False),
        (1.27, 1.0, True),
        (0.79, -1.0, False),
        (0.81, -1.0, True),
        (0.5, 1.0, True),
        (2.0, -1.0, True),
    ],
)
def test_the_clip_stops_a_token_only_where_it_went_too_far_in_its_own_direction(ratio, advantage, moves):
    logprob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    loss, bound = clipped_loss(logprob, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]), (0.2, 0.28))
    loss.sum().backward()
    assert (logprob.grad.item() != 0.0) is moves
    assert bound.item() is not moves


def test_the_kl_estimate_is_unbiased_and_zero_for_equal_policies():
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(16, dtype=torch.float64, generator=generator).softmax(0)
    q = (p.log() + 0.3 * torch.randn(16, dtype=torch.float64, generator=generator)).softmax(0)
    drawn = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    exact = float((p * (p / q).log()).sum())
    assert kl_estimate(p.log()[drawn], q.log()[drawn]) == pytest.approx(exact, rel=0.03)
    assert kl_estimate(p.log()[drawn], p.log()[drawn]) == 0.0
