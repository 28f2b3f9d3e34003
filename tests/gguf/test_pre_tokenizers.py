"""llama.cpp's names of the rules by which text is cut."""

from __future__ import annotations

from typing import Any

import pytest

from streamconv.gguf.pre_tokenizers import normalizes, pre_tokenizer
from tests.gguf.bases import LLAMA3, QWEN2, split_rule

CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+C"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*C"
    r"|\p{N}N| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = CASED.replace("C", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace(r"\p{N}N", r"\p{N}{1,3}")
TEKKEN = CASED.replace("C", "").replace(r"\p{N}N", r"\p{N}")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def sequence(*rules: object) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [*rules]}


@pytest.mark.parametrize(
    ("rule", "ignores", "name"),
    [
        (split_rule(LLAMA3), True, "llama-bpe"),
        (split_rule(LLAMA3), False, "dbrx"),
        (split_rule(QWEN2), False, "qwen2"),
        (split_rule(QWEN2), True, None),
        (split_rule(GPT_4O), False, "gpt-4o"),
        (split_rule(TEKKEN), False, "tekken"),
        (split_rule(TEKKEN), True, "tekken"),
        (BYTES, False, "gpt-2"),
        (BYTES | {"use_regex": False}, False, None),
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
            False,
            "smollm",
        ),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, BYTES]}, False, None),
        (split_rule(r"\s+"), False, None),
        (sequence(7), False, None),
        ({"type": "Sequence"}, False, None),
        ({"type": "Whitespace"}, False, None),
        (None, False, None),
        ("ByteLevel", False, None),
    ],
)
def test_names(rule: Any, ignores: bool, name: str | None) -> None:
    assert pre_tokenizer(rule, ignores_merges=ignores) == name


def test_a_split_of_another_behaviour_is_another_rule() -> None:
    rule = split_rule(LLAMA3)
    rule["pretokenizers"][0]["behavior"] = "Removed"
    assert pre_tokenizer(rule, ignores_merges=True) is None
    rule = split_rule(LLAMA3)
    rule["pretokenizers"][0]["invert"] = True
    assert pre_tokenizer(rule, ignores_merges=True) is None


def test_only_composing_leaves_text_as_it_is() -> None:
    assert not normalizes(None)
    assert not normalizes({"type": "NFC"})
    assert normalizes({"type": "Lowercase"})
