"""The addition task: taught responses are right, wrong ones get no reward, committed prompts are the generated ones."""

from __future__ import annotations

import random

import pytest

from sglang_er.models import task, tokenizer


@pytest.mark.parametrize("operands", [2, 7, task.MAX_OPERANDS])
def test_a_written_response_is_right(operands: int):
    rng = random.Random(operands)
    for _ in range(50):
        prompt = task.make_prompt(rng, operands, "easy")
        assert task.verify(prompt, task.write_response(rng, prompt.prompt)) == 1.0


def test_every_line_of_a_written_response_adds_one_operand():
    rng = random.Random(3)
    prompt = task.make_prompt(rng, 9, "easy")
    operands = task.operands_of(prompt.prompt)
    first_pass = task.write_response(rng, prompt.prompt).split("check\n")[0].split("\n")
    totals, letters = [], []
    for line in first_pass:
        body = line.split(" ")[-1]
        if body[:1].isalpha():
            letter, term, total = body[0], body[1:4], body[5:]
            assert int(term[::-1]) == operands[letter]
            letters.append(letter)
            totals.append(int(total[::-1]))
    assert sorted(letters) == list(operands)
    assert [b - a for a, b in zip([0, *totals], totals)] == [operands[letter] for letter in letters]


def test_free_choices_differ_and_the_answer_does_not():
    prompt = task.make_prompt(random.Random(0), 6, "easy")
    responses = {task.write_response(random.Random(seed), prompt.prompt) for seed in range(20)}
    assert len(responses) == 20
    assert {task.extract_answer(response) for response in responses} == {prompt.answer}


@pytest.mark.parametrize(
    "response",
    ["", "=", "=12x", "so 00000\n", "=1886 and more", "=1887", "1886", "=01886", "=-1886", "=1886\n=3"],
)
def test_a_wrong_or_missing_answer_gets_no_reward(response: str):
    prompt = task.Prompt("a=237 b=682 c=967 sum?", "1886", "easy")
    assert task.verify(prompt, response) == 0.0
    assert task.verify(prompt, "=1886") == 1.0


@pytest.mark.parametrize("difficulty", task.DIFFICULTIES)
def test_the_committed_prompts_are_the_generated_ones(difficulty: str):
    prompts = task.load_prompts(difficulty)
    assert prompts == task.generate_prompts(difficulty)
    assert len({prompt.prompt for prompt in prompts}) == task.PROMPTS_PER_SET
    low, high = task.OPERANDS[difficulty]
    for prompt in prompts:
        operands = task.operands_of(prompt.prompt)
        assert low <= len(operands) <= high
        assert sum(operands.values()) == int(prompt.answer)


def test_taught_responses_fit_and_have_a_long_tail():
    rng = random.Random(1)
    encoder = tokenizer.build_tokenizer()
    prompts = [prompt for difficulty in task.DIFFICULTIES for prompt in task.load_prompts(difficulty)]
    lengths = [len(encoder.encode(task.write_response(rng, prompt.prompt)).ids) + 1 for prompt in prompts]
    assert max(lengths) <= task.MAX_RESPONSE_TOKENS
    assert max(lengths) >= 8 * sum(lengths) / len(lengths)


def test_unknown_difficulty_and_bad_operand_counts_are_refused():
    with pytest.raises(ValueError, match="easy, medium, hard"):
        task.load_prompts("trivial")
    with pytest.raises(ValueError, match=r"2\.\.24"):
        task.make_prompt(random.Random(0), 25, "easy")
