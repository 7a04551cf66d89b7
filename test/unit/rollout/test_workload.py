"""Batches: long-tailed, the same every time, within what the prompt sets and a block's time allow."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import mean

import pytest

from sglang_er.models import task, tokenizer
from sglang_er.rollout import workload


def test_a_batch_is_long_tailed_and_always_the_same():
    batch = workload.make_batch(8)
    limits = [rollout.max_tokens for rollout in batch]
    assert batch == workload.make_batch(8)
    assert max(limits) > 2 * mean(limits)
    assert [rollout.endpoint for rollout in batch] == ["openai", "generate"] * 4
    assert len({rollout.prompt for rollout in batch}) == 8


@pytest.mark.parametrize("operands", [2, 5, 16])
def test_the_limit_has_room_for_a_whole_response_without_checks(operands):
    rng = random.Random(1)
    prompt = task.make_prompt(rng, operands, "easy")
    encoder = tokenizer.build_tokenizer()
    longest = max(
        len(encoder.encode(response).ids) + 1
        for response in (task.write_response(rng, prompt.prompt) for _ in range(50))
        if "check" not in response
    )
    assert longest <= workload.response_limit(operands) <= longest + 15


def test_a_slow_machine_gets_a_shorter_tail_and_a_hopeless_one_the_shortest():
    quick, slow, hopeless = (workload.batch_within(8, s, 2 * s, 25.0) for s in (0.01, 0.08, 10.0))
    longest = [max(rollout.max_tokens for rollout in batch) for batch in (quick, slow, hopeless)]
    assert longest[0] > longest[1] > longest[2]
    assert hopeless == workload.make_batch(8, workload.PROFILES[-1])


@pytest.mark.parametrize(("size", "words"), [(0, "at least one"), (10_000, "ask for fewer")])
def test_an_impossible_batch_is_refused_in_one_line(size, words):
    with pytest.raises(ValueError, match=words):
        workload.make_batch(size)


def test_plain_seconds_count_every_step_at_the_batch_that_still_runs():
    batch = [replace(rollout, max_tokens=n) for rollout, n in zip(workload.make_batch(3), (10, 40, 20))]
    # 10 steps of three requests, 10 of two, 20 of one
    assert workload.plain_seconds(batch, alone=1.0, together=3.0) == 10 * 3 + 10 * 2 + 20 * 1


def test_greedy_prompts_are_not_those_of_the_batches():
    greedy = {prompt.prompt for prompt in workload.greedy_prompts(4)}
    assert len(greedy) == 4
    for operands in workload.PROFILES:
        assert not greedy & {rollout.prompt.prompt for rollout in workload.make_batch(8, operands)}
