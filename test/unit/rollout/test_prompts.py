"""Requests have exactly the tokens that were asked for, and text that goes on."""

from __future__ import annotations

import pytest

from sglang_er.models import tokenizer
from sglang_er.rollout import prompts


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("count", [1, 16, 40, 64, 256, 1000])
def test_prompts_have_the_exact_length_and_are_always_the_same(text: bool, count: int):
    made = prompts.make_requests([7, 9], count, text, seed=3)
    assert [len(request.input_ids) for request in made] == [count, count]
    assert [request.output_tokens for request in made] == [7, 9]
    assert made == prompts.make_requests([7, 9], count, text, seed=3)


@pytest.mark.parametrize("count", [64, 128, 256, 512])
def test_a_task_prompt_ends_within_a_response_that_checks_itself(count: int):
    decoder = tokenizer.build_tokenizer()
    for request in prompts.make_requests([1] * 20, count, True, seed=0):
        shown = decoder.decode(list(request.input_ids), skip_special_tokens=False)
        assert (
            shown.startswith(tokenizer.IM_START) and "check\n" in shown and "=" not in shown.partition("assistant")[2]
        )


def test_prompts_of_a_batch_and_of_seeds_differ():
    first, second = (prompts.make_requests([1] * 8, 64, True, seed) for seed in (0, 1))
    assert len({request.input_ids for request in first + second}) == 16


@pytest.mark.parametrize(
    ("card", "known"), [({}, False), ({"shape": "flat"}, False), ({"shape": "tiny"}, True), ({"shape": "0.5b"}, True)]
)
def test_only_models_that_learned_the_task_get_its_text(card: dict[str, str], known: bool):
    assert prompts.knows_the_task(card) is known


def test_sampling_forces_the_length():
    sampling = prompts.Request((1,), 5).sampling(0.5)
    assert sampling == {"temperature": 0.5, "max_new_tokens": 5, "ignore_eos": True}
