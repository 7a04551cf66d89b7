"""Hypothesis: every logprob that a request returns is the target's, not the twin's and not the filtered one.

Method: output, top, chosen-id and input logprobs against a plain server with the same fp32 weights; then sampled
outputs are scored as prompts, a path without any speculation, and compared with what was returned while sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from support.equality import assert_same, greedy, ids, steps_of
from support.prompts import mixed_prompts
from support.server import Server

pytestmark = pytest.mark.server

WATCHED_IDS = [3, 77, 250]
LAST_ID = 319
FIELDS = {"return_logprob": True, "top_logprobs_num": 4, "token_ids_logprob": WATCHED_IDS, "logprob_start_len": 0}
Position = list[Any]


def worst(got: list[Any], expected: list[Any]) -> float:
    """Largest difference between two (nested) lists of [logprob, token id, text]; ids must agree."""
    assert len(got) == len(expected)
    largest = 0.0
    for mine, theirs in zip(got, expected, strict=True):
        if mine is None or theirs is None:
            assert mine == theirs
        elif isinstance(mine[0], list):
            largest = max(largest, worst(mine, theirs))
        else:
            assert mine[1] == theirs[1], f"token {mine[1]} instead of {theirs[1]}"
            assert (mine[0] is None) == (theirs[0] is None)
            largest = max(largest, abs(mine[0] - theirs[0]) if mine[0] is not None else 0.0)
    return largest


def assert_same_logprobs(got: dict[str, Any], expected: dict[str, Any], count: int) -> None:
    mine, theirs = got["meta_info"], expected["meta_info"]
    for name in ("token_logprobs", "top_logprobs", "token_ids_logprobs"):
        for side in ("input", "output"):
            assert mine[f"{side}_{name}"], f"{side}_{name} is empty"
            difference = worst(mine[f"{side}_{name}"], theirs[f"{side}_{name}"])
            assert difference < 1e-4, f"{side}_{name} differs by {difference}"
        assert len(mine[f"output_{name}"]) == count


def test_greedy_logprobs_equal_plain(plain: Server, spec: Server) -> None:
    """All four kinds, 12 requests at a time, the draft length changing every step."""
    prompts = mixed_prompts(12, seed=41, longest=100)
    plain.flush_cache()
    expected = plain.generate_all(prompts, greedy(48), concurrency=12, **FIELDS)
    spec.cycle()
    spec.flush_cache()
    with steps_of(spec) as steps:
        got = spec.generate_all(prompts, greedy(48), concurrency=12, **FIELDS)
    assert_same(ids(got), ids(expected), "greedy with logprobs")
    for mine, theirs in zip(got, expected):
        assert_same_logprobs(mine, theirs, 48)
    steps.assert_speculated()


def test_sampled_logprobs_equal_plain(plain: Server, server: Callable[[str], Server]) -> None:
    """Seeded sampling with temperature, top-p and top-k: the convention is that of the plain sampler."""
    speculating = server("seeded")
    prompts = mixed_prompts(8, seed=42, longest=60)
    kind = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "max_new_tokens": 40, "ignore_eos": True}
    sampling = [kind | {"sampling_seed": 500 + i} for i in range(8)]
    plain.flush_cache()
    expected = plain.generate_all(prompts, sampling, concurrency=8, **FIELDS)
    speculating.cycle()
    speculating.flush_cache()
    got = speculating.generate_all(prompts, sampling, concurrency=8, **FIELDS)
    assert_same(ids(got), ids(expected), "sampled with logprobs")
    for mine, theirs in zip(got, expected):
        assert_same_logprobs(mine, theirs, 40)


@pytest.mark.parametrize("gamma", [3, 7])
def test_rescoring_gives_the_returned_logprobs(plain: Server, spec: Server, gamma: int) -> None:
    """T=1, no seed: prompt + output scored as a prompt by the plain server, all in fp32, so within 1e-3."""
    prompts = mixed_prompts(16, seed=43, longest=60)
    sampling = {"temperature": 1.0, "max_new_tokens": 64, "ignore_eos": True}
    spec.fixed(gamma)
    with steps_of(spec) as steps:
        replies = spec.generate_all(prompts, sampling, concurrency=16, return_logprob=True)
    steps.assert_speculated(gamma)

    sequences = [prompt + reply["output_ids"] for prompt, reply in zip(prompts, replies)]
    only_score = {"temperature": 1.0, "max_new_tokens": 0}
    scored = plain.generate_all(sequences, only_score, concurrency=8, return_logprob=True, logprob_start_len=0)
    for prompt, reply, score in zip(prompts, replies, scored):
        returned = reply["meta_info"]["output_token_logprobs"]
        assert [entry[1] for entry in returned] == reply["output_ids"]
        # SGLang reports the last id of the vocabulary as 0 among input logprobs (its guard against image tokens).
        rescored = score["meta_info"]["input_token_logprobs"][len(prompt) :]
        assert all(entry[1] == (token if token < LAST_ID else 0) for entry, token in zip(rescored, reply["output_ids"]))
        rescored = [[entry[0], token, None] for entry, token in zip(rescored, reply["output_ids"])]
        assert worst(returned, rescored) < 1e-3
        # Sampled, not argmax: the text cannot have been the most likely one throughout.
        assert all(math.isfinite(entry[0]) and entry[0] < 0 for entry in returned)
