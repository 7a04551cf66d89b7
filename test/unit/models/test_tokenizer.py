"""The tokenizer loses nothing, keeps what the task needs in single tokens, and is what transformers loads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sglang_er.compat import torchvision_shim
from sglang_er.models import task, tokenizer


def _round_trip(text: str) -> str:
    encoder = tokenizer.build_tokenizer()
    return encoder.decode(encoder.encode(text).ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    "text", ["", " ", "so so  so\n\n", "héllo ☃ 𝄞", "<|im_end|>x<|im_start|>", "a=1\tb=2\r\n", "\x00\x7f"]
)
def test_a_string_comes_back(text: str):
    assert _round_trip(text) == text


def test_random_unicode_comes_back():
    rng = random.Random(0)
    for _ in range(200):
        points = [
            rng.choice((rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(20)
        ]
        text = "".join(map(chr, points))
        assert _round_trip(text) == text


def test_every_byte_has_its_token():
    encoder = tokenizer.build_tokenizer()
    text = "".join(map(chr, range(0x110)))  # reaches bytes 0x00..0x7f, 0x80..0xbf and lead bytes
    assert max(encoder.encode("\U0010ffff\x00").ids) < 256
    assert encoder.decode(encoder.encode(text).ids) == text


def test_the_task_is_written_in_single_tokens():
    encoder = tokenizer.build_tokenizer()
    for filler in task.FILLERS:
        for mark in task.MARKS:
            assert encoder.encode(f"{filler}c583{mark}00000\n").tokens[1:6] == ["c", "5", "8", "3", mark]
    assert len(encoder.encode("check\n").ids) == 2


def test_ids_fill_the_vocabulary_and_special_ids_are_right():
    encoder = tokenizer.build_tokenizer()
    assert sorted(encoder.get_vocab().values()) == list(range(tokenizer.VOCAB_SIZE))
    for name, text in (("eos", tokenizer.EOS), ("pad", tokenizer.PAD), ("im_start", tokenizer.IM_START)):
        assert encoder.token_to_id(text) == tokenizer.special_ids()[name]


def test_transformers_loads_it_with_its_chat_template(tmp_path: Path):
    torchvision_shim.install()
    from transformers import AutoTokenizer

    tokenizer.save_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "a=100 b=200 sum?"}]
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == tokenizer.chat_text(
        "a=100 b=200 sum?"
    )
    text = "so a001>00100\n=100 é☃"
    assert loaded(text)["input_ids"] == tokenizer.build_tokenizer().encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.eos_token_id == tokenizer.special_ids()["eos"]
    assert len(loaded) == tokenizer.VOCAB_SIZE
