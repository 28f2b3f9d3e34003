"""Text of forty words and a tokenizer to whom each is a token, so that a test knows the ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCABULARY

BOS, EOS = 1, 2
SPECIAL = {BOS: "<s>", EOS: "</s>"}
CHAT = "{{ bos_token }}{% for message in messages %} w3 {{ message['content'] }}{% endfor %}"


def word(token: int) -> str:
    return SPECIAL.get(token, f"w{token}")


def save_tokenizer(folder: Path, *, begins: bool = False) -> None:
    """`begins`: it puts BOS before a text."""
    words = Tokenizer(WordLevel({word(i): i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    if begins:
        words.post_processor = TemplateProcessing(
            single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS]
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def numbers(count: int) -> list[int]:
    """Tokens that look like nothing in particular."""
    return [(place * place + 3 * place) % 37 + 3 for place in range(count)]


def words(ids: Sequence[int]) -> str:
    return " ".join(map(word, ids))


def write_text(path: Path, count: int = 2000) -> Path:
    path.write_text(words(numbers(count)))
    return path


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path
