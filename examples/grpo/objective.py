"""The arithmetic of GRPO (Shao et al. 2024, section 4.1) with the token mean and the wider upper clip of DAPO."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / std within a row of `rewards` [prompts, samples]; 0 where all samples got the same reward."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True, unbiased=False) + EPSILON)


def clipped_loss(
    logprobs: torch.Tensor, before: torch.Tensor, advantages: torch.Tensor, clip: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token [N]: -min(ratio A, clipped ratio A) with ratio = exp(logprobs - before), and whether the clip bound.

    `before`: the logprobs that the server gave with the sampled tokens.
    """
    ratio = (logprobs - before).exp()
    free, bound = ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages
    return -torch.minimum(free, bound), bound < free


def kl_estimate(sampled: torch.Tensor, other: torch.Tensor) -> float:
    """KL(sampling policy || other) per token, of the logprobs [N] that both give to the sampled tokens, in nats.

    mean(r - 1 - log r) with r = other / sampled: unbiased, never negative (Schulman 2020, "k3").
    """
    log_ratio = other.double() - sampled.double()
    return float((log_ratio.exp() - 1 - log_ratio).mean())
