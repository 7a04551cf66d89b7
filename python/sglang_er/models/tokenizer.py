"""A byte-complete tokenizer of 320 tokens: 256 bytes, a few merges for the words of the task, special tokens.

Every string encodes and decodes to itself. A digit, a letter that names an operand and a mark are one token each; so is
each word of `task.FILLERS` with the space after it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 320
EOS = "<|im_end|>"
PAD = "<|endoftext|>"
IM_START = "<|im_start|>"
MAX_LENGTH = 4096

#: Byte-pair merges in order of priority; "_" stands for a space.
_MERGES = """
a s|i s|is t|s ist|as sist|a n|an t|assist ant|u s|e r|us er|e n|e x|t h|i th|p u|d _|w _|t _|k _|o _
s o_|a d|ad d_|an d_|n o|no w_|th en|then _|n ex|nex t_|w ith|with _|p l|pl us|plus _|t a|ta k|tak e|take _
g e|ge t_|o k_|pu t_|e c|c h|ch ec|chec k|u m|s um
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_alphabet() -> list[str]:
    """The printable character that the byte-level scheme of GPT-2 uses for each byte 0..255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def build_tokenizer() -> Tokenizer:
    """The tokenizer, as a `tokenizers.Tokenizer`. Ids 0..255 are the bytes; the special tokens come last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = _byte_alphabet()
    vocab = {symbol: byte for byte, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for rule in "|".join(_MERGES.split("\n")[1:-1]).split("|"):
        left, right = (part.replace("_", alphabet[ord(" ")]) for part in rule.split(" "))
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    # No regular expression splits the text: the merges above cannot reach across a digit, a mark or a line.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{index}|>" for index in range(VOCAB_SIZE - len(vocab) - 3)]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*reserved, PAD, IM_START, EOS)]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise AssertionError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


def chat_text(prompt: str) -> str:
    """A user's prompt as the chat template renders it, up to where the response starts."""
    return f"{IM_START}user\n{prompt}{EOS}\n{IM_START}assistant\n"


def special_ids() -> dict[str, int]:
    """Ids of the special tokens: `pad`, `im_start`, `eos`."""
    return {"pad": VOCAB_SIZE - 3, "im_start": VOCAB_SIZE - 2, "eos": VOCAB_SIZE - 1}


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `directory`."""
    build_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "eos_token": EOS,
        "pad_token": PAD,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
