"""The task that the small models are trained on: adding a list of three-digit numbers, written out line by line.

A prompt names each operand by a letter::

    a=385 b=472 c=118 sum?

and a response carries a running total, least significant digit first, one operand a line::

    so 00000          the running total starts at 0
    add a583>58300    takes a (385, written 583); the total is 385
    now c811:30500    ... c; the total is 503. The order of two neighbours, the first word and the mark are free
    then b274>57900   ... b; the total is 975
    =975              the answer, most significant digit first

Digits are written in the order in which a carry moves, so that every digit depends only on what is already on the page.
Where a model is free, the training data draws at random: the word that opens a line, the mark before the total, whether
two neighbouring operands swap, and whether to write ``check`` and add everything once more. That freedom is the model's
entropy at temperature 1; the optional checks, which follow each other, give response lengths their long tail.

Pure Python: no torch, no sglang.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources

DIFFICULTIES = ("easy", "medium", "hard")
#: Operands per prompt, inclusive. Chosen from the trained models' accuracy: docs/models.md has the measurement.
OPERANDS = {"easy": (2, 6), "medium": (7, 13), "hard": (14, 24)}
MAX_OPERANDS = 24
PROMPTS_PER_SET = 256

#: Words that may open a line, most frequent first, each one token (with its space).
FILLERS = ("so ", "add ", "and ", "now ", "then ", "next ", "with ", "plus ", "take ", "get ", "ok ", "put ")
_FILLER_WEIGHTS = tuple(1.0 / rank for rank in range(1, len(FILLERS) + 1))
MARKS = (">", ":", "|", "~")
_MARK_WEIGHTS = (0.55, 0.25, 0.12, 0.08)
SWAP_PROBABILITY = 0.35
#: Probability of (another) check: few responses start to check, and those that did tend to go on.
FIRST_CHECK_PROBABILITY = 0.06
NEXT_CHECK_PROBABILITY = 0.88
TOTAL_DIGITS = 5
#: A check is begun only if the response stays below this many tokens with it: it fits a 2048-token context.
MAX_RESPONSE_TOKENS = 1800

_ANSWER = re.compile(r"=(\d+)\s*$")
_OPERAND = re.compile(r"\b([a-z])=(\d{3})\b")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set: the user's text, the right answer in decimal digits, and the set's name."""

    prompt: str
    answer: str
    difficulty: str


def make_prompt(rng: random.Random, operands: int, difficulty: str) -> Prompt:
    """A prompt with `operands` three-digit numbers (2..24) drawn from `rng`."""
    if not 2 <= operands <= MAX_OPERANDS:
        raise ValueError(f"operands must be in 2..{MAX_OPERANDS}, got {operands}")
    values = [rng.randint(100, 999) for _ in range(operands)]
    terms = " ".join(f"{letter}={value}" for letter, value in zip(string.ascii_lowercase, values, strict=False))
    return Prompt(prompt=f"{terms} sum?", answer=str(sum(values)), difficulty=difficulty)


def operands_of(prompt: str) -> dict[str, int]:
    """Letter -> value of the operands that a prompt names, in its order."""
    return {letter: int(value) for letter, value in _OPERAND.findall(prompt)}


def _order(rng: random.Random, letters: list[str]) -> list[str]:
    """The letters in order, except that some disjoint pairs of neighbours are swapped."""
    ordered: list[str] = []
    position = 0
    while position < len(letters):
        if position + 1 < len(letters) and rng.random() < SWAP_PROBABILITY:
            ordered += [letters[position + 1], letters[position]]
            position += 2
        else:
            ordered.append(letters[position])
            position += 1
    return ordered


def _little_endian(value: int, width: int) -> str:
    return f"{value:0{width}d}"[::-1]


def _one_pass(rng: random.Random, operands: dict[str, int]) -> Iterator[str]:
    """The lines of one addition from 0, each ending in a newline."""

    def filler() -> str:
        return rng.choices(FILLERS, _FILLER_WEIGHTS)[0]

    total = 0
    yield f"{filler()}{_little_endian(0, TOTAL_DIGITS)}\n"
    for letter in _order(rng, list(operands)):
        total += operands[letter]
        mark = rng.choices(MARKS, _MARK_WEIGHTS)[0]
        term = _little_endian(operands[letter], 3)
        yield f"{filler()}{letter}{term}{mark}{_little_endian(total, TOTAL_DIGITS)}\n"


def write_response(rng: random.Random, prompt: str) -> str:
    """A right response to `prompt`, its free choices drawn from `rng`: what the models are trained on."""
    operands = operands_of(prompt)
    pass_tokens = 7 + 12 * len(operands) + 6  # opening line, one line an operand, "check\n"
    lines = list(_one_pass(rng, operands))
    passes = 1
    while (passes + 1) * pass_tokens < MAX_RESPONSE_TOKENS:
        if rng.random() >= (FIRST_CHECK_PROBABILITY if passes == 1 else NEXT_CHECK_PROBABILITY):
            break
        lines += ["check\n", *_one_pass(rng, operands)]
        passes += 1
    return "".join(lines) + f"={sum(operands.values())}"


def extract_answer(response: str) -> str | None:
    """The number after the last ``=``, if the response ends with one; None otherwise."""
    match = _ANSWER.search(response)
    return match.group(1) if match else None


def verify(prompt: Prompt, response: str) -> float:
    """Reward of a response's text (special tokens removed): 1.0 if it ends in the right answer, 0.0 otherwise."""
    return 1.0 if extract_answer(response) == prompt.answer else 0.0


def generate_prompts(difficulty: str, count: int = PROMPTS_PER_SET, seed: int = 0) -> list[Prompt]:
    """A deterministic prompt set; `load_prompts` returns the committed one (seed 0, 256 prompts)."""
    low, high = _operand_range(difficulty)
    rng = random.Random(f"{difficulty}/{seed}")
    return [make_prompt(rng, rng.randint(low, high), difficulty) for _ in range(count)]


def _operand_range(difficulty: str) -> tuple[int, int]:
    if difficulty not in OPERANDS:
        raise ValueError(f"unknown difficulty {difficulty!r}: choose one of {', '.join(DIFFICULTIES)}")
    return OPERANDS[difficulty]


@cache
def _read_prompts(difficulty: str) -> tuple[Prompt, ...]:
    _operand_range(difficulty)
    path = resources.files(__package__) / "assets" / f"prompts_{difficulty}.jsonl"
    with path.open(encoding="utf-8") as lines:
        return tuple(Prompt(**json.loads(line)) for line in lines)


def load_prompts(difficulty: str) -> list[Prompt]:
    """The committed prompt set of a difficulty: ``easy``, ``medium`` or ``hard``; 256 prompts.

    Raises ValueError for another name.
    """
    return list(_read_prompts(difficulty))


def to_jsonl(prompts: list[Prompt]) -> str:
    """The prompts as JSON Lines, the format of the committed sets."""
    return "".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts)
