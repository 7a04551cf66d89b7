"""Counts over blocks: independent responses pass, responses that share draws within a block do not."""

from __future__ import annotations

import numpy as np
from grpo.dispersion import dispersion_p

SHAPE = (30, 8, 8, 5)  # blocks, prompts, samples, tokens


def test_independent_responses_pass_whatever_the_prompts():
    rng = np.random.default_rng(1)
    rates = rng.uniform(1.0, 9.0, size=(1, SHAPE[1], 1, SHAPE[3]))
    found, expected, p = dispersion_p(rng.poisson(np.broadcast_to(rates, SHAPE)).astype(float), 300)
    assert p > 0.01
    assert 0.7 < found / expected < 1.3


def test_draws_that_a_block_shares_are_seen():
    rng = np.random.default_rng(2)
    shared = rng.gamma(40.0, 1 / 40.0, size=(SHAPE[0], 1, 1, SHAPE[3]))
    assert dispersion_p(rng.poisson(4.0 * np.broadcast_to(shared, SHAPE)).astype(float), 300)[2] < 0.01
